# Copyright 2026 The FineFace authors.
# SPDX-License-Identifier: Apache-2.0
"""How the page looks: colours and letters. Sizes and places stand in `look.css`."""

from pathlib import Path

import gradio as gr


FOLDER = Path(__file__).resolve().parent
CSS = (FOLDER / "look.css").read_text("utf-8")
HEAD = f"<script>{(FOLDER / 'controls.js').read_text('utf-8')}</script>"


def make_theme() -> gr.Theme:
    """Paper, ink and terracotta, in the system's own letters: no font comes from a network."""
    accent = gr.themes.Color(
        *("#fdf4f0", "#fbe6de", "#f5c9ba", "#eda88f", "#e28768", "#cf6544"),
        *("#b04a2c", "#8f3b23", "#72311f", "#5a281b", "#33150d"),
    )
    theme = gr.themes.Base(
        primary_hue=accent,
        neutral_hue="stone",
        radius_size="lg",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    return theme.set(
        body_background_fill="#faf8f5",
        body_background_fill_dark="#171412",
        block_background_fill="white",
        block_background_fill_dark="#211d1a",
        block_label_background_fill="white",
        block_label_background_fill_dark="#211d1a",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_border_width="1px",
        block_shadow="none",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*primary_50",
        button_secondary_background_fill_dark="#2a2521",
        button_secondary_background_fill_hover_dark="#38312c",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
        button_border_width="1px",
        button_large_text_weight="600",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
        color_accent="*primary_600",
    )
