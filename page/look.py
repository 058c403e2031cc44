# SPDX-License-Identifier: Apache-2.0
"""How the page looks: colours and letters. Sizes and places are in `look.css`."""

from pathlib import Path

import gradio as gr


FOLDER = Path(__file__).resolve().parent
CSS = (FOLDER / "look.css").read_text("utf-8")
HEAD = f"<script>{(FOLDER / 'controls.js').read_text('utf-8')}</script>"
# By Gradio's names: the colour by day and the colour by night.
COLOURS = {
    "body_background_fill": ("#faf8f5", "#171412"),
    "block_background_fill": ("white", "#211d1a"),
    "block_label_background_fill": ("white", "#211d1a"),
    "block_title_text_color": ("*neutral_800", "*neutral_100"),
    "block_info_text_color": ("*neutral_500", "*neutral_400"),
    "body_text_color_subdued": ("*neutral_500", "*neutral_400"),
    "button_primary_background_fill": ("*primary_600", "*primary_600"),
    "button_primary_background_fill_hover": ("*primary_700", "*primary_500"),
    "button_secondary_background_fill": ("white", "#2a2521"),
    "button_secondary_background_fill_hover": ("*primary_50", "#38312c"),
    "button_secondary_border_color": ("*neutral_300", "*neutral_700"),
    "slider_color": ("*primary_600", "*primary_400"),
}


def make_theme() -> gr.Theme:
    """Paper, ink and terracotta, in the system's own letters: no font comes from a network."""
    accent = "#fdf4f0 #fbe6de #f5c9ba #eda88f #e28768 #cf6544 #b04a2c #8f3b23 #72311f #5a281b #33150d"
    theme = gr.themes.Base(
        primary_hue=gr.themes.Color(*accent.split()),
        neutral_hue="stone",
        radius_size="lg",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    by_day = {name: day for name, (day, _) in COLOURS.items()}
    by_night = {f"{name}_dark": night for name, (_, night) in COLOURS.items()}
    sizes = {"block_border_width": "1px", "block_shadow": "none", "button_border_width": "1px"}
    sizes |= {"button_large_text_weight": "600"}
    return theme.set(**by_day, **by_night, **sizes, button_primary_text_color="white", color_accent="*primary_600")
