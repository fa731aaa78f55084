"""What TensorBoard loads: the tab, its page, and the routes that answer it.

Whatever is imported here is imported at every start of TensorBoard, and an error would stop all of
it. So the rooms behind the routes wait for `load`, whose errors TensorBoard catches.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.plugins import base_plugin

NAME = "lca"
_LOG = logging.getLogger(__name__)
_STATIC = Path(__file__).parent / "static"
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

App = Callable[..., Any]


class LCALoader(base_plugin.TBLoader):  # type: ignore[misc]
    """Makes the plugin once TensorBoard is up."""

    def fix_flags(self, flags: Any) -> None:
        """Asks for every chunk of the record, unless the user asked for a number."""
        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            samples.setdefault(NAME, 0)

    def load(self, context: Any) -> LCAPlugin:
        """Makes the plugin for this TensorBoard."""
        return LCAPlugin(context)


class LCAPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """The tab, and what it asks for."""

    plugin_name = NAME

    def __init__(self, context: Any) -> None:
        """Prepares an empty store: nothing is read before the page asks."""
        from lightning_lca.tensorboard.runs import Store

        self._provider = context.data_provider
        self._store = Store()

    def is_active(self) -> bool:
        """Leaves it to TensorBoard, which enables the tab where a run has data of this plugin."""
        return False

    def frontend_metadata(self) -> Any:
        """Names the tab and its page."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="LCA")

    def get_plugin_apps(self) -> dict[str, App]:
        """Returns a handler for every route: the answers, the page's files, and its colours."""
        from lightning_lca.tensorboard.routes import ANSWERS

        files = [path for path in _STATIC.rglob("*") if path.is_file()]
        apps = {
            f"/{path.relative_to(_STATIC).as_posix()}": _text(path.read_bytes, path.suffix)
            for path in files
        }
        apps["/colours.js"] = _text(lambda: colours().encode(), ".js")
        return apps | {f"/{name}": self._answer(name) for name in ANSWERS}

    def _answer(self, name: str) -> App:
        import numpy as np
        from tensorboard import plugin_util
        from tensorboard.backend import http_util
        from werkzeug import Request, Response

        from lightning_lca.tensorboard import answers
        from lightning_lca.tensorboard.provider import Source
        from lightning_lca.tensorboard.query import Query, QueryError
        from lightning_lca.tensorboard.routes import ANSWERS

        @Request.application
        def app(request: Request) -> Any:
            if request.method not in ("GET", "HEAD"):
                return _refuse(request, f"{request.method} is not answered here. Use GET.", 405)
            context = plugin_util.context(request.environ)
            experiment = plugin_util.experiment_id(request.environ)
            source = Source(self._provider, context, experiment)
            try:
                # Sums of large numbers may be infinite; they are told as such.
                with np.errstate(over="ignore", invalid="ignore"):
                    answer = ANSWERS[name](self._store, source, Query(request.args))
                if isinstance(answer, dict):
                    as_bytes = answers.COLUMNS in request.headers.get("Accept", "")
                    text = answers.as_columns(answer) if as_bytes else answers.as_json(answer)
            except QueryError as error:
                return _refuse(request, str(error), 400)
            except Exception as error:
                _LOG.exception("LCA: /%s cannot be answered.", name)
                why = f"This cannot be answered: {type(error).__name__}: {error}"
                return _refuse(request, f"{why}. Is the record damaged? Please report it.", 500)
            if isinstance(answer, dict):
                kind = answers.COLUMNS if as_bytes else "application/json"
                return http_util.Respond(request, text, kind)
            # A table may be long: it is written while it is sent.
            return Response(
                answer.text if request.method == "GET" else None,
                mimetype="text/csv",
                headers={
                    "Content-Disposition": f'attachment; filename="{answer.file_name}"',
                    "X-Content-Type-Options": "nosniff",
                    "Cache-Control": "no-cache, must-revalidate",
                },
            )

        return app


def _refuse(request: Any, why: str, code: int) -> Any:
    from tensorboard.backend import http_util

    headers = [("Allow", "GET, HEAD")] if code == 405 else None
    text = json.dumps({"error": why})
    return http_util.Respond(request, text, "application/json", code=code, headers=headers)


def colours() -> str:
    """Writes the module with the colours that the page shares with the figures."""
    from lightning_lca.record.colours import DARK, LIGHT

    return f"export const LIGHT = {json.dumps(LIGHT)};\nexport const DARK = {json.dumps(DARK)};\n"


def _text(read: Callable[[], bytes], suffix: str) -> App:
    from tensorboard.backend import http_util
    from werkzeug import Request

    @Request.application
    def app(request: Request) -> Any:
        if request.method not in ("GET", "HEAD"):
            return _refuse(request, f"{request.method} is not answered here. Use GET.", 405)
        return http_util.Respond(request, read(), _TYPES.get(suffix, "text/plain"))

    return app
