"""Progress bars: the terminal shows what it shows without LCACallback, and our own lines."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("pty", reason="pseudo-terminals are there on Unix only")
import fcntl
import pty
import struct
import termios

from support.processes import environment

pytestmark = pytest.mark.slow
COLUMNS = 400  # So that no line is broken.
SCRIPT = """
import sys
import warnings
from support.models import Classifier, pl, toy_loader
from support.training import make_trainer
from lightning_lca import LCACallback

class Wanders(Classifier):
    '''Its loss depends on the step number, which the callback warns of, once.'''

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.1 * self.trainer.global_step

warnings.filterwarnings("always", "LCA")  # Not only for the first bar.
bars = {"tqdm": pl.callbacks.TQDMProgressBar, "rich": pl.callbacks.RichProgressBar}
for name in sys.argv[2:]:
    print("bar", name, flush=True)
    pl.seed_everything(1)
    callbacks = [bars[name](refresh_rate=1)]
    callbacks += [LCACallback(figures=False)] * (sys.argv[1] == "with")
    trainer = make_trainer("PATH", *callbacks, max_steps=-1, max_epochs=3, enable_progress_bar=True)
    trainer.fit(Wanders(), toy_loader())
    print("end", flush=True)
"""
BARS = ["tqdm"]
try:
    import rich  # noqa: F401

    BARS.append("rich")
except ModuleNotFoundError:  # It is in the extra "test", and the bar needs it.
    pass


def screen(path, *arguments):
    """Runs the script in a terminal; gives what each line of it shows in the end, unstyled."""
    path.mkdir()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.replace("PATH", str(path)), *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(TERM="xterm", COLUMNS=str(COLUMNS)),
        close_fds=True,
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # So Linux says that the other side has been closed.
            break
        if not part:
            break
        said += part
    os.close(ours)
    assert process.wait() == 0, said.decode()
    return [shown(line) for line in said.decode().split("\n")]


def shown(line):
    """Finds what a line shows in the end: what was written after the last return to its start."""
    line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip("\r")
    line = line.rpartition("\r")[2]
    line = re.sub(r"\d+:\d\d(:\d\d)?|[\d.?]+ ?(it/s|s/it)|--", "~", line)
    line = re.sub(r"█+", "█", line)  # A speed with one digit more makes the bar shorter.
    # A bar is drawn so many times a second: how far the last drawing went is chance.
    line = re.sub(r"[━╺╸]+ +\d/6.*?~ • \S+ +~", "━ n/6 ~", line)
    return re.sub(r" +", " ", line).rstrip()


@pytest.fixture(scope="module")
def screens(tmp_path_factory):
    """What the terminal shows per bar, {bar: (without, with)}."""
    path = tmp_path_factory.mktemp("bars")
    parts = {}
    for how in ("without", "with"):
        text = "\n".join(screen(path / how, how, *BARS))
        parts[how] = dict(re.findall(r"^bar (\w+)\n(.*?)^end", text, re.MULTILINE | re.DOTALL))
    return {bar: [parts[how][bar].split("\n") for how in parts] for bar in BARS}


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_the_terminal_shows_the_bars_as_without_us_and_our_own_lines_whole(screens, bar):
    if bar not in screens:
        pytest.skip("rich is not installed")
    without, found = screens[bar]
    assert any("Epoch 2" in line and re.search("[6n]/6", line) for line in without), (
        "there is a bar"
    )
    ours = [line for line in found if "LCA" in line]
    rest = [line for line in found if line not in ours]
    assert rest == without
    told = [line for line in ours if line.startswith("LCA: 3 probe gradients first, then 3 per")]
    warned = [line for line in ours if re.match(r"\S+py:\d+: (UserWarning: )?LCA: the probe", line)]
    assert len(told) == len(warned) == 1, ours
