"""The page `/docs`, which lists every route. Its files are in this package, so it works without the internet."""

from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse

from omnivideo.api.errors import build_not_found_error

WEB_FOLDER = Path(__file__).parent / "web"
MEDIA_TYPES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}


def add_documentation(app: FastAPI) -> None:
    """Add the page and its files."""

    @app.get("/docs", include_in_schema=False)
    async def show_documentation() -> HTMLResponse:
        # The addresses are relative, so that they hold behind a proxy with a path of its own.
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon-32x32.png",
        )

    @app.get("/docs/{name}", include_in_schema=False)
    async def send_file(name: str) -> FileResponse:
        if name not in MEDIA_TYPES:
            raise build_not_found_error("file", name)
        headers = {"Cache-Control": "max-age=86400"}
        return FileResponse(WEB_FOLDER / name, media_type=MEDIA_TYPES[name], headers=headers)
