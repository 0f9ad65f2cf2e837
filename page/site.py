"""The page as a whole: one tab for each kind of model, its appearance, and its server."""

from collections.abc import Callable

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from page import box_view, class_view, text_view, volume_view
from page.access import LOOPBACK
from page.settings import PageSettings, kind_of
from page.uploads import MOST_BYTES
from prediction.models import LoadedModel

# kind of model -> title of its tab, and the function that builds its view
VIEWS: dict[str, tuple[str, Callable]] = {
    "text": ("Describe in words", text_view.build),
    "classes": ("Find known classes", class_view.build),
    "boxes": ("Mark with boxes and points", box_view.build),
    "volumes": ("Volumes", volume_view.build),
}

# Uploads and pictures are removed from the temporary folder every minute once they are ten minutes
# old. Their content is in the sessions.
DELETE_FILES = (60, 600)  # seconds
SYSTEM_FONTS = ["system-ui", "sans-serif"]  # named alone, so that no font is fetched
CSS = """
footer { display: none !important; }
h2, h3 { margin: 0 0 0.2em !important; }
p { margin: 0 0 0.2em !important; }
p.error { color: #b00020; font-weight: 600; }
.dark p.error { color: #ff8a80; }
.swatch { display: inline-block; width: 1em; height: 1em; border: 1px solid #555;
          vertical-align: -0.15em; margin-right: 0.3em; }
.html-container { padding: 0 2px !important; }
.prose table { width: 100%; }
.prose table, .prose tbody, .prose tr, .prose td, .prose th { border: 0 !important; }
.prose td, .prose th { text-align: left; padding: 0.1em 0.6em 0.1em 0 !important; }
.upload svg { display: none; }
input:checked:hover { background-color: var(--checkbox-background-color-selected) !important; }
.slice .image-container { background: black; }
.image-container img { width: 100%; height: 100%; object-fit: contain; }
"""


def build(models: list[LoadedModel], settings: PageSettings) -> gr.Blocks:
    """Return the page of these models."""
    by_kind = {}
    for loaded in models:
        by_kind.setdefault(kind_of(loaded), []).append(loaded)

    with gr.Blocks(
        title="Medical image segmentation", delete_cache=DELETE_FILES, analytics_enabled=False
    ) as page:
        gr.HTML(
            "<h2>Medical image segmentation</h2>"
            "<p>For research and teaching only, not for diagnosis. Images stay on the computer "
            "that runs this page, and are forgotten when you close it.</p>",
            elem_id="page-title",
        )
        if len(by_kind) == 1:
            ((kind, members),) = by_kind.items()
            VIEWS[kind][1](members, settings)
        else:
            for kind, members in by_kind.items():
                title, build_view = VIEWS[kind]
                with gr.Tab(title, elem_id=f"tab-{kind}"):
                    build_view(members, settings)

        def forget(request: gr.Request) -> None:
            settings.sessions.forget(request.session_hash)

        page.unload(forget)
    return page


def theme() -> gr.themes.Base:
    """Return the colours, fonts and distances of the page. Nothing of it is fetched."""
    sober = gr.themes.Default(
        primary_hue="blue", neutral_hue="gray", font=SYSTEM_FONTS, font_mono=["monospace"]
    )
    return sober.set(layout_gap="10px", block_padding="8px 10px")


def host_check(host: str) -> list[Middleware]:
    """Return a check that requests are addressed to this machine, if only it can reach the page.

    Else a web site whose name is made to lead to this machine (DNS rebinding) could use the page
    from the browser of a visitor.
    """
    if host not in LOOPBACK:
        return []
    return [Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])]


def serve(page: gr.Blocks, host: str, port: int, login: tuple[str, str] | None) -> str:
    """Start the server in the background and return the address of the page.

    login: user and password.
    """
    page.queue(max_size=64, api_open=False)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        auth=login,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=False,
        run_history=False,
        footer_links=[],
        allowed_paths=[],
        max_file_size=MOST_BYTES,
        enable_monitoring=False,
        # no list of the server's addresses
        app_kwargs={"openapi_url": None, "middleware": host_check(host)},
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=CSS,
    )
    return address
