"""Blue helps and red hurts: the colours of figures, dashboard and notebooks, by their ground.

On light ground the blue is dark and the red light, so that they differ in grey print too. In the
output of a notebook nobody says which ground it is: there both have a contrast of 3 on either.
"""

LIGHT = {"helps": "#174f92", "hurts": "#ec6a45"}
DARK = {"helps": "#79bbff", "hurts": "#ff7f5f"}
EITHER = {"helps": "#4189d0", "hurts": "#e25b36"}
