"""Drawing a snapshot: memory, the batch, deadlines, the queue and the last seconds, in one image."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from llmsched_gym.env.snapshot import Snapshot

WIDTH, HEIGHT = 960, 540  # pixels
HISTORY_S = 20.0  # what the strips show

WHITE, INK, FAINT, GRID, EMPTY = "#ffffff", "#1c2733", "#68737f", "#dfe4ea", "#f1f3f6"
PREFILL, DECODE, MEMORY, SPOILED = "#e69f00", "#0072b2", "#5a6b7d", "#8c97a3"
# apart in lightness too: CIELAB distances of 35 and more under every form of colour blindness
SLACK_COLOURS = ("#5c1033", "#c2493d", "#e6d27a", "#5bbcae")
SLACK_LABELS = ("overdue", "< 20 %", "20-50 %", "> 50 %")
PALETTE = (WHITE, INK, FAINT, GRID, EMPTY, PREFILL, DECODE, MEMORY, SPOILED, *SLACK_COLOURS)
SLACK_STYLES = ("bold red", "magenta", "yellow", "green")


@cache
def font_of(size: int, bold: bool = False) -> Any:
    """The font of that size (pixels), which matplotlib brings along."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


class Box(NamedTuple):
    """A plot's area in pixels."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        """Pixels from left to right."""
        return self.right - self.left

    @property
    def height(self) -> int:
        """Pixels from top to bottom."""
        return self.bottom - self.top

    def y(self, share: float) -> int:
        """Height of a share of the axis, 0 at the bottom."""
        return round(self.bottom - share * self.height)

    def x(self, share: float) -> int:
        """Pixel of a share of the axis, 0 on the left."""
        return round(self.left + share * self.width)


KV = Box(16, 80, 300, 104)
BATCH = Box(332, 80, 944, 104)
DECODES = Box(64, 166, 944, 276)
PROMPTS = Box(64, 352, 572, 510)
TOKENS = Box(648, 352, 944, 396)
TIMES = Box(648, 414, 944, 452)
ATTAINED = Box(648, 470, 944, 510)
BELOW = 22  # pixels under the running requests' axis, for overdue ones


class Canvas:
    """One image; a thin layer over PIL's drawing with half-open pixel boxes."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH, HEIGHT), WHITE)
        self._draw = ImageDraw.Draw(self.image)

    def rect(self, left: float, top: float, right: float, bottom: float, fill: str, outline: str | None = None) -> None:
        """A rectangle; none narrower than a pixel."""
        if right - left >= 1 and bottom - top >= 1:
            self._draw.rectangle((round(left), round(top), round(right) - 1, round(bottom) - 1), fill, outline)

    def line(self, points: list[tuple[float, float]], fill: str, width: int = 1) -> None:
        """A line through points (x, y) in pixels."""
        self._draw.line(points, fill, width)

    def text(
        self, x: float, y: float, text: str, *, size: int = 12, bold: bool = False, fill: str = INK, anchor: str = "ls"
    ) -> float:
        """Write `text` with its baseline at `y`; returns where it ends."""
        font = font_of(size, bold)
        self._draw.text((x, y), text, fill, font, anchor)
        return x + font.getlength(text)

    def diamond(self, x: float, y: float, radius: int, fill: str) -> None:
        """A diamond about (x, y)."""
        self._draw.polygon([(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)], fill)

    def ticks(self, box: Box, ticks: list[tuple[float, str]]) -> None:
        """Horizontal grid lines at shares of the axis, with labels on the left."""
        for share, label in ticks:
            self.rect(box.left, box.y(share), box.right, box.y(share) + 1, GRID)
            self.text(box.left - 6, box.y(share) + 4, label, size=10, fill=FAINT, anchor="rs")


def axis_top(value: float) -> int:
    """The smallest power of two from 512 on that holds `value`."""
    return max(512, 1 << max(0, math.ceil(value) - 1).bit_length())


def draw_memory(canvas: Canvas, shot: Snapshot) -> None:
    """The KV cache as a bar that fills up."""
    total = max(1, shot.total_blocks)
    used = shot.used_blocks / total
    end = canvas.text(KV.left, KV.top - 10, "KV cache ", bold=True)
    canvas.text(end, KV.top - 10, f"{100 * used:.0f} % of {shot.total_blocks:,} blocks in use")
    canvas.rect(*KV, EMPTY)
    canvas.rect(KV.left, KV.top, KV.x(used), KV.bottom, MEMORY)
    canvas.rect(KV.x(1.0 - shot.spare_blocks / total), KV.top, KV.right, KV.bottom, GRID)
    if shot.num_batches:
        canvas.rect(KV.x(shot.last_usage) - 1, KV.top - 3, KV.x(shot.last_usage) + 1, KV.bottom + 3, INK)
    for share in (0.0, 0.5, 1.0):
        anchor = "ls" if share == 0.0 else "rs" if share == 1.0 else "ms"
        canvas.text(KV.x(share), KV.bottom + 15, f"{100 * share:.0f} %", size=10, fill=FAINT, anchor=anchor)


def draw_batch(canvas: Canvas, shot: Snapshot, is_idle: bool, top: int) -> None:
    """Tokens of the last batch, decodes and prompts, as a bar of up to `top` tokens."""
    end = canvas.text(BATCH.left, BATCH.top - 10, "Batch ", bold=True)
    tokens = shot.decode_tokens + shot.prefill_tokens
    if shot.num_batches == 0:
        canvas.text(end, BATCH.top - 10, "none yet")
    else:
        what = f"just run: {tokens:,} tokens in {1e3 * shot.duration_s:.0f} ms"
        what = "engine idle; the last one:" if is_idle else what
        canvas.text(end, BATCH.top - 10, what if shot.forming is None else f"{what}; thin: being formed")
    parts = ((f"{shot.prefill_tokens:,} prompt tokens", PREFILL), (f"{shot.decode_tokens} decodes", DECODE))
    for (label, colour), right in zip(parts, (BATCH.right, BATCH.right - 150), strict=True):
        canvas.text(right, BATCH.top - 10, label, size=11, anchor="rs")
        left = right - font_of(11).getlength(label) - 15
        canvas.rect(left, BATCH.top - 19, left + 10, BATCH.top - 9, colour)
    canvas.rect(*BATCH, EMPTY)
    if shot.num_batches:
        done = shot.decode_tokens
        canvas.rect(BATCH.left, BATCH.top, BATCH.x(done / top), BATCH.bottom, DECODE)
        for chunk in shot.chunks:
            canvas.rect(BATCH.x(done / top) + 1, BATCH.top, BATCH.x((done + chunk) / top), BATCH.bottom, PREFILL)
            done += chunk
    if shot.forming is not None:
        decodes, prefill = shot.forming
        middle, end = BATCH.x(min(1.0, decodes / top)), BATCH.x(min(1.0, (decodes + prefill) / top))
        canvas.rect(BATCH.left, BATCH.bottom + 1, middle, BATCH.bottom + 5, DECODE)
        canvas.rect(middle, BATCH.bottom + 1, end, BATCH.bottom + 5, PREFILL)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        anchor = "ls" if share == 0.0 else "rs" if share == 1.0 else "ms"
        label = f"{share * top:,.0f}" if share else "0 tokens"
        canvas.text(BATCH.x(share), BATCH.bottom + 15, label, size=10, fill=FAINT, anchor=anchor)


def draw_legend(canvas: Canvas, y: int) -> None:
    """What the colours of decodes mean."""
    x: float = WIDTH - 16
    filled = [(label, colour, None) for label, colour in zip(SLACK_LABELS, SLACK_COLOURS, strict=True)]
    for label, fill, outline in (("can no longer attain", WHITE, SPOILED), *filled):
        x -= font_of(11).getlength(label)
        canvas.text(x, y, label, size=11)
        canvas.rect(x - 15, y - 9, x - 5, y + 1, fill, outline)
        x -= 28
    x -= font_of(11).getlength("strict user")
    canvas.text(x, y, "strict user", size=11)
    canvas.diamond(x - 9, y - 4, 4, INK)


def draw_running(canvas: Canvas, shot: Snapshot, places: dict[int, int]) -> None:
    """Decodes as columns at their `places`, by their slack."""
    box = DECODES
    end = canvas.text(16, box.top - 20, "Decodes ", bold=True)
    canvas.text(
        end,
        box.top - 20,
        f"{len(shot.decodes)} of {shot.max_num_seqs}: time left to the next token, share of the TBT SLO",
    )
    canvas.ticks(box, [(0.0, "0"), (0.5, "50 %"), (1.0, "100 %")])
    canvas.text(box.left - 6, box.bottom + BELOW - 2, "late", size=10, fill=FAINT, anchor="rs")
    pitch = max(3.0, min(12.0, box.width / max(1, shot.max_num_seqs)))
    for s in shot.decodes:
        left = round(box.left + 1 + places[s.request] * pitch)
        right = round(box.left + 1 + (places[s.request] + 1) * pitch) - 1
        if right > box.right:
            continue
        colour = SLACK_COLOURS[s.level]
        if s.left_s >= 0.0:
            fill, outline = (WHITE, SPOILED) if s.is_late else (colour, None)
            canvas.rect(left, min(box.y(s.left), box.bottom - 2), right, box.bottom, fill, outline)
        else:
            canvas.rect(left, box.bottom + 1, right, max(box.bottom + 4, box.bottom - s.left * BELOW), colour)
        if s.is_strict:
            canvas.diamond((left + right - 1) // 2, box.top - 8, 4, INK)


def draw_prompts(canvas: Canvas, shot: Snapshot) -> None:
    """Prompts under way and waiting, as columns of what is left of them."""
    box = PROMPTS
    end = canvas.text(16, box.top - 20, "Prompts ", bold=True)
    canvas.text(
        end,
        box.top - 20,
        f"{len(shot.started)} started, {len(shot.waiting)} waiting: tokens, coloured by time left to the first token",
    )
    top = axis_top(shot.max_model_len)
    canvas.ticks(box, [(k / 4, f"{k * top / 4:,.0f}") for k in range(5)])
    pitch, most = 16, (box.width - 4) // 16
    prompts = [*shot.started, *shot.waiting]
    for i, s in enumerate(prompts[:most]):
        left = box.left + 4 + i * pitch
        colour, y = SLACK_COLOURS[s.level], min(box.y(s.tokens / top), box.bottom - 2)
        canvas.rect(left, y, left + pitch - 3, box.bottom, colour)
        if s.computed_tokens:
            done = box.y(s.computed_tokens / top)
            canvas.rect(left, done, left + pitch - 3, box.bottom, WHITE, colour)
        if s.is_strict:
            canvas.diamond(left + 6, y - 7, 4, INK)
    if len(prompts) > most:
        canvas.text(box.right, box.top - 6, f"and {len(prompts) - most:,} more", size=11, fill=FAINT, anchor="rs")
    elif not prompts:
        canvas.text(box.x(0.5), box.y(0.5), "queue empty", size=11, fill=FAINT, anchor="mm")


class Run(NamedTuple):
    """A batch in the history."""

    end_s: float
    duration_s: float
    decode_tokens: int
    tokens: int


def draw_history(
    canvas: Canvas, clock_s: float, runs: list[Run], attainment: list[tuple[float, float]], top: int
) -> None:
    """Tokens per batch (`runs`, an axis of up to `top`) and attainment over the last seconds."""

    def x(time_s: float) -> float:
        return TOKENS.x(max(0.0, 1.0 - (clock_s - time_s) / HISTORY_S))

    end = canvas.text(588, TOKENS.top - 20, "History ", bold=True)
    if attainment:
        what = f"{100 * attainment[-1][1]:.0f} % of the last minute's arrivals on time"
        canvas.text(end, TOKENS.top - 20, what)
    longest_ms = max((1e3 * r.duration_s for r in runs), default=0.0)
    top_ms = next((ms for ms in (100, 200, 500, 1000, 2000, 5000, 10000) if longest_ms <= ms), 20000)
    for box, label, unit in (
        (TOKENS, f"{top:,}", "tokens"),
        (TIMES, f"{top_ms:,}", "ms/batch"),
        (ATTAINED, "100", "% on time"),
    ):
        canvas.ticks(box, [(0.0, "0"), (1.0, label)])
        canvas.text(588, box.y(0.5) + 4, unit, size=10, fill=INK)
    for run in runs:
        left, right = x(run.end_s - run.duration_s), x(run.end_s)
        right = max(right, left + 1)
        middle = TOKENS.y(min(1.0, run.decode_tokens / top))
        canvas.rect(left, TOKENS.y(min(1.0, run.tokens / top)), right, middle, PREFILL)
        canvas.rect(left, middle, right, TOKENS.bottom, DECODE)
        canvas.rect(left, TIMES.y(min(1.0, 1e3 * run.duration_s / top_ms)), right, TIMES.bottom, MEMORY)
    if len(attainment) > 1:
        canvas.line([(x(time_s), ATTAINED.y(share)) for time_s, share in attainment], INK, 2)
    canvas.text(TOKENS.left, HEIGHT - 16, f"{HISTORY_S:.0f} s ago", size=10, fill=FAINT)
    canvas.text(TOKENS.right, HEIGHT - 16, "now", size=10, fill=FAINT, anchor="rs")
