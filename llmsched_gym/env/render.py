"""Pictures of one environment: a text frame, an image, a live terminal panel. They show what a scheduler may see."""

from __future__ import annotations

import atexit
import math
import time
from collections import deque
from copy import copy
from typing import Any

import numpy as np
from PIL import Image

from llmsched_gym.env.core import EnvCore
from llmsched_gym.env.picture import (
    ATTAINED,
    DECODES,
    FAINT,
    HISTORY_S,
    SLACK_STYLES,
    WIDTH,
    Canvas,
    Run,
    axis_top,
    draw_batch,
    draw_history,
    draw_legend,
    draw_memory,
    draw_prompts,
    draw_running,
    font_of,
)
from llmsched_gym.env.snapshot import Shown, Snapshot, attainment, snapshot

FRAMES_PER_S = 20  # of the live panel in a terminal


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}" if number == 1 else f"{number:,} {unit}s"


def _gauge(shares: list[tuple[float, str]], cells: int) -> str:
    """Shares of one row of cells, each drawn with its character."""
    row, done = "", 0.0
    for share, character in shares:
        done += share
        row += character * (round(min(1.0, done) * cells) - len(row))
    return row.ljust(cells, "·")


def _rows(text: Any, shown: list[Shown], unit: str, rest: int) -> None:
    for s in shown:
        user, state = "strict" if s.is_strict else "relaxed", "  was late" if s.is_late and s.left_s >= 0.0 else ""
        text.append(f"  #{s.request:<5} {user:7} {s.tokens:>6,} {unit} ")
        text.append(_gauge([(max(0.0, s.left), "━")], 16), SLACK_STYLES[s.level])
        text.append(f" {s.left_s:7.3f} of {s.slo_s:.3g} s{state}\n")
    if rest > 0:
        text.append(f"  and {rest:,} more\n", "dim")


def frame_text(shot: Snapshot, caption: str, most: int = 6) -> Any:
    """A frame as rich text: clock, counts, KV cache, batch, the decodes next due, the head of the queue."""
    from rich.text import Text

    text = Text(no_wrap=True)
    text.append(f"{caption}   t = {shot.clock_s:.3f} s   batch {shot.num_batches:,}\n", "bold")
    text.append("   ".join(f"{name} {count:,}" for name, count in _counts(shot)) + "\n")
    usage = shot.used_blocks / max(1, shot.total_blocks)
    text.append(f"KV      {_gauge([(usage, '█')], 24)} {100 * usage:.0f} % of {shot.total_blocks:,} blocks\n")
    text.append("batch   ")
    if shot.num_batches == 0:
        text.append("none yet\n")
    else:
        decodes, prefill = shot.decode_tokens, shot.prefill_tokens
        total = max(1, decodes + prefill)
        text.append(_gauge([(decodes / total, "█"), (prefill / total, "▒")], 24), "blue")
        text.append(
            f" {_count(decodes, 'decode')} + {_count(prefill, 'prompt token')}, {1e3 * shot.duration_s:.1f} ms\n"
        )
    if shot.forming is not None:
        text.append(f"forming {_count(shot.forming[0], 'decode')} + {_count(shot.forming[1], 'prompt token')}\n")
    urgent = sorted(shot.decodes, key=lambda s: (s.left_s, s.request))
    text.append(f"decodes {len(urgent)}, the next due first: time left to the next token\n")
    _rows(text, urgent[:most], "emitted", len(urgent) - most)
    prompts = [*shot.started, *shot.waiting]
    text.append(f"prompts {len(shot.started)} started, {len(shot.waiting)} waiting: time left to the first token\n")
    _rows(text, prompts[:most], "tokens ", len(prompts) - most)
    text.rstrip()
    return text


def _counts(shot: Snapshot) -> list[tuple[str, int]]:
    """The counts worth showing: refusals, rejections and turns cancelled only where there are any."""
    always = ("arrived", "finished", "on time", "late", "abandoned")
    return [(name, count) for name, count in shot.counts.items() if count or name in always]


class LivePanel:
    """A panel in a terminal that stays and changes."""

    def __init__(self) -> None:
        self._live: Any = None
        self._drawn_s = 0.0  # wall time of the last frame in a terminal

    def show(self, text: Any) -> None:
        """Update the panel: FRAMES_PER_S frames at most in a terminal, elsewhere the last frame at the end."""
        from rich.console import Console
        from rich.live import Live
        from rich.panel import Panel

        if self._live is None:
            self._live = Live(console=Console(), auto_refresh=False)
            self._live.start()
            atexit.register(self.close)
        is_terminal = self._live.console.is_terminal
        if is_terminal:
            time.sleep(max(0.0, self._drawn_s + 1.0 / FRAMES_PER_S - time.monotonic()))
            self._drawn_s = time.monotonic()
        self._live.update(Panel(text, expand=False), refresh=is_terminal)

    def close(self) -> None:
        """Stop the panel."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            atexit.unregister(self.close)


class Viewer:
    """Draws one environment and remembers what its history strips and its places need."""

    def __init__(self, core: EnvCore, caption: str | None = None, env: int = 0) -> None:
        self.core, self.env = core, env
        self.caption = f"LLMSched, suite {core.config.suite}" if caption is None else caption
        self._panel = LivePanel()
        self._forget()

    def _forget(self) -> None:
        self._table = self.core.tables[self.env]
        self._runs: deque[Run] = deque(maxlen=4096)
        self._attainment: deque[tuple[float, float]] = deque(maxlen=4096)
        self._places: dict[int, int] = {}  # of decodes in the picture: a bar stays where it is while its request runs
        self._seen = (0, 0.0)  # batches and clock when it was looked at last
        self._judged_s = -math.inf  # when the last attainment was taken
        self._is_idle = False

    def history(self) -> dict[str, Any]:
        """What it remembers of the episode, for a copy of its environment."""
        kept = ("_runs", "_attainment", "_places", "_seen", "_judged_s", "_is_idle")
        return {name: copy(getattr(self, name)) for name in kept}

    def go_on(self, history: dict[str, Any]) -> None:
        """Remember what :meth:`history` returned of the same moment."""
        vars(self).update({name: copy(value) for name, value in history.items()})

    def render(self, mode: str) -> str | np.ndarray | None:
        """A frame: text for "ansi", (HEIGHT, WIDTH, 3) uint8 for "rgb_array"; "human" updates a panel."""
        shot = self._look()
        if mode == "ansi":
            return frame_text(shot, self.caption).plain
        if mode == "rgb_array":
            return np.asarray(self._image(shot))
        self._panel.show(frame_text(shot, self.caption))
        return None

    def _look(self) -> Snapshot:
        """Take a snapshot and add it to the history."""
        shot = snapshot(self.core, self.env)
        self.notice()
        if self._judged_s < shot.clock_s:
            self._judge(shot.clock_s, shot.attainment)
        self._seat(shot)
        return shot

    def notice(self) -> None:
        """Add the last batch to the history, if it is not there yet; what a frame needs of batches between frames."""
        sim = self.core.engine.state.sims[self.env]
        clock_s, num_batches = float(sim.clock_s), int(sim.num_batches)
        if self.core.tables[self.env] is not self._table or clock_s < self._seen[1]:
            self._forget()
        if num_batches > self._seen[0]:
            tokens, decodes = int(sim.last_batch_tokens), int(sim.last_batch_decodes)
            self._runs.append(Run(clock_s, float(sim.last_batch_s), decodes, tokens))
            self._is_idle = False
        elif clock_s > self._seen[1]:
            self._is_idle = True
        if clock_s >= self._judged_s + HISTORY_S / ATTAINED.width:  # one a pixel
            self._judge(clock_s, attainment(self.core, self.env))
        while self._runs and self._runs[0].end_s < clock_s - HISTORY_S:
            self._runs.popleft()
        while self._attainment and self._attainment[0][0] < clock_s - HISTORY_S:
            self._attainment.popleft()
        self._seen = (num_batches, clock_s)

    def _judge(self, clock_s: float, attained: float) -> None:
        self._judged_s = clock_s
        if not math.isnan(attained):
            self._attainment.append((clock_s, attained))

    def _seat(self, shot: Snapshot) -> None:
        """Give every decode a place of its own, newcomers the first free one."""
        here = {s.request for s in shot.decodes}
        self._places = {r: place for r, place in self._places.items() if r in here}
        free = iter(sorted(set(range(shot.max_num_seqs)) - set(self._places.values())))
        for s in shot.decodes:
            if s.request not in self._places:
                self._places[s.request] = next(free)

    def _image(self, shot: Snapshot) -> Image.Image:
        canvas = Canvas()
        canvas.text(16, 32, self.caption, size=16, bold=True)
        x: float = WIDTH - 16
        for name, count in reversed(_counts(shot)):
            x -= font_of(12).getlength(name)
            canvas.text(x, 32, name, fill=FAINT)
            x -= font_of(12, True).getlength(f"{count:,}") + 5
            canvas.text(x, 32, f"{count:,}", bold=True)
            x -= 16
        canvas.text(x - 12, 32, f"{shot.clock_s:.2f} s", size=16, bold=True, anchor="rs")
        top = axis_top(max([shot.decode_tokens + shot.prefill_tokens, *(r.tokens for r in self._runs)]))
        draw_memory(canvas, shot)
        draw_batch(canvas, shot, self._is_idle, top)
        draw_legend(canvas, DECODES.top - 20)
        draw_running(canvas, shot, self._places)
        draw_prompts(canvas, shot)
        draw_history(canvas, shot.clock_s, list(self._runs), list(self._attainment), top)
        return canvas.image

    def close(self) -> None:
        """Stop the live panel."""
        self._panel.close()
