"""Blue helps and red hurts: the colours of figures and dashboard, on light and on dark ground.

On light ground the blue is dark and the red light, so that they differ in grey print too.
"""

LIGHT = {"helps": "#174f92", "hurts": "#ec6a45"}
DARK = {"helps": "#79bbff", "hurts": "#ff7f5f"}
