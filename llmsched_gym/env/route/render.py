"""Pictures of a routing environment: replicas side by side, and the request that is to be routed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from llmsched_gym.engine.batch import is_prefill
from llmsched_gym.env.picture import DECODE, EMPTY, FAINT, HEIGHT, INK, MEMORY, PREFILL, SLACK_COLOURS, WIDTH, Canvas
from llmsched_gym.env.render import LivePanel

ROWS = 16  # replicas in an image, the first ones
TOP, LINE = 112, 26  # pixels
# columns of the table: left and right edge
NAME, WAITING, RUNNING, MEMORY_AT, BATCH, CACHED, TTFT = (
    (16, 162),
    (170, 274),
    (286, 436),
    (452, 572),
    (588, 718),
    (734, 834),
    (850, 944),
)


class ReplicaShot(NamedTuple):
    """One replica in a frame."""

    name: str
    is_up: bool
    is_legal: bool
    is_last: bool  # it served the session last
    num_waiting: int
    num_prompts: int  # running requests whose prompt is not complete
    num_decodes: int
    max_num_seqs: int
    kv_usage: float
    decode_tokens: int  # of the last batch
    prefill_tokens: int
    cached_share: float  # of the prompt at hand
    predicted_ttft_s: float
    num_delivered: int


class RouteShot(NamedTuple):
    """One moment of a routing environment."""

    now_s: float
    request: str  # the one at hand, in words
    counts: dict[str, int]
    replicas: tuple[ReplicaShot, ...]


def shot_of(core: Any, env: int) -> RouteShot:
    """What a frame shows of environment `env`: nothing that a router must not know but how batches went."""
    cluster = core.cluster
    state, nodes = cluster.state, cluster.nodes
    route, r, requests = nodes.routes[env], cluster.deciding(env), state.requests[env]
    asks = r >= 0
    replicas = []
    for j, k in enumerate(cluster.lanes(env)):
        sim, node, candidate = state.sims[k], nodes.nodes[k], nodes.candidates[k]
        prompts = sum(bool(is_prefill(requests[i])) for i in state.running[k, : sim.num_running].tolist())
        prompt = int(requests[r].prefill_tokens) if asks else 1
        replicas.append(
            ReplicaShot(
                name=f"{j} {cluster.profiles[j].name}"[:18],
                is_up=not node.is_down,
                is_legal=bool(asks and candidate.is_legal),
                is_last=bool(asks and route.last_replica == j),
                num_waiting=int(sim.num_waiting),
                num_prompts=prompts,
                num_decodes=int(sim.num_running) - prompts,
                max_num_seqs=int(sim.max_num_seqs),
                kv_usage=float(sim.total_blocks - sim.free_blocks) / int(sim.total_blocks),
                decode_tokens=int(sim.last_batch_decodes),
                prefill_tokens=int(sim.last_batch_tokens - sim.last_batch_decodes),
                cached_share=int(candidate.cached_tokens) / prompt if asks else 0.0,
                predicted_ttft_s=float(candidate.predicted_ttft_s) if asks else 0.0,
                num_delivered=int(node.num_delivered),
            )
        )
    sims = state.sims[cluster.lanes(env)]
    episode = state.episodes[env]
    counts = {
        "arrived": int(episode.num_arrived),
        "at the router": int(route.num_held),
        "waiting": int(sims["num_waiting"].sum()),
        "running": int(sims["num_running"].sum()),
        "moving": int(route.num_moving),
        "finished": int(sims["num_finished"].sum()),
        "abandoned": int(sims["num_abandoned"].sum()),
    }
    always = ("arrived", "waiting", "running", "finished")
    shown = {name: count for name, count in counts.items() if count or name in always}
    return RouteShot(float(route.now_s), _words(requests[r]) if asks else "no request", shown, tuple(replicas))


def _words(request: Any) -> str:
    user = "strict" if request.slo_class == 0 else "relaxed"
    return f"{user} user, {int(request.prefill_tokens):,} prompt tokens, TTFT SLO {float(request.ttft_slo_s):.2f} s"


def _bar(share: float, cells: int, mark: str = "█") -> str:
    return (mark * round(min(1.0, max(0.0, share)) * cells)).ljust(cells, "·")


def _note(replica: ReplicaShot) -> str:
    if not replica.is_up:
        return "down"
    return "last" if replica.is_last else "" if replica.is_legal else "-"


def route_text(shot: RouteShot, caption: str) -> Any:
    """A frame as rich text of 80 columns: a line a replica."""
    from rich.text import Text

    text = Text(no_wrap=True)
    text.append(f"{caption}   t = {shot.now_s:.3f} s\n", "bold")
    text.append("   ".join(f"{name} {count:,}" for name, count in shot.counts.items()) + "\n")
    text.append(f"to be routed: {shot.request}\n")
    text.append(f"{'replica':<16}{'wait':>5}{'run':>5} {'KV':<12}{'batch':>11} {'cached':<12}{'TTFT':>8}\n", "dim")
    for r in shot.replicas:
        batch = f"{r.decode_tokens}+{r.prefill_tokens}"
        line = f"{r.name[:15]:<16}{r.num_waiting:>5}{r.num_prompts + r.num_decodes:>5} {_bar(r.kv_usage, 11)}"
        line += f" {batch:>10} {_bar(r.cached_share, 11)} {r.predicted_ttft_s:>6.2f} s"
        text.append(f"{line} {_note(r)}\n", "dim" if not r.is_up else "")
    text.rstrip()
    return text


class RouteViewer:
    """Draws one routing environment."""

    def __init__(self, core: Any, env: int = 0) -> None:
        self.core, self.env = core, env
        self.caption = f"LLMRoute, suite {core.config.suite}, {core.config.replica_scheduler} inside"
        self._panel = LivePanel()

    def history(self) -> None:
        """Nothing to remember for a copy: all that is shown lies in the environment."""

    def render(self, mode: str) -> str | np.ndarray | None:
        """A frame: text for "ansi", (height, width, 3) uint8 for "rgb_array"; "human" updates a panel."""
        shot = shot_of(self.core, self.env)
        if mode == "rgb_array":
            return np.asarray(self._image(shot))
        text = route_text(shot, self.caption)
        if mode == "ansi":
            plain: str = text.plain
            return plain
        self._panel.show(text)
        return None

    def _image(self, shot: RouteShot) -> Any:
        canvas = Canvas()
        canvas.text(16, 32, self.caption, size=16, bold=True)
        canvas.text(944, 32, f"{shot.now_s:.2f} s", size=16, bold=True, anchor="rs")
        x: float = 16
        for name, count in shot.counts.items():
            x = canvas.text(x, 58, f"{count:,}", bold=True) + 5
            x = canvas.text(x, 58, name, fill=FAINT) + 16
        canvas.text(16, 80, f"to be routed: {shot.request}")
        headings = ("replica", "waiting", "running: decodes, prompts", "KV memory in use", "last batch, tokens")
        for (left, _), heading in zip((NAME, WAITING, RUNNING, MEMORY_AT, BATCH, CACHED, TTFT), headings, strict=False):
            canvas.text(left, TOP - 10, heading, size=10, fill=FAINT)
        canvas.text(CACHED[0], TOP - 10, "prompt cached", size=10, fill=FAINT)
        canvas.text(TTFT[0], TOP - 10, "predicted TTFT", size=10, fill=FAINT)
        most_waiting = max([16, *(r.num_waiting for r in shot.replicas)])
        most_tokens = max([512, *(r.decode_tokens + r.prefill_tokens for r in shot.replicas)])
        for i, replica in enumerate(shot.replicas[:ROWS]):
            _draw_replica(canvas, TOP + i * LINE, replica, most_waiting, most_tokens)
        if len(shot.replicas) > ROWS:
            canvas.text(16, TOP + ROWS * LINE + 12, f"and {len(shot.replicas) - ROWS} more replicas", fill=FAINT)
        rows = min(len(shot.replicas), ROWS + 1)
        return canvas.image.crop((0, 0, WIDTH, min(HEIGHT, TOP + rows * LINE + 16)))

    def close(self) -> None:
        """Stop the live panel."""
        self._panel.close()


def _draw_replica(canvas: Canvas, top: int, replica: ReplicaShot, most_waiting: int, most_tokens: int) -> None:
    bottom, baseline = top + LINE - 8, top + 13
    canvas.text(NAME[0], baseline, replica.name, bold=replica.is_last, fill=INK if replica.is_legal else FAINT)
    if not replica.is_up:
        canvas.text(WAITING[0], baseline, "down", fill=SLACK_COLOURS[1], bold=True)
        return
    _bars(canvas, WAITING, top, bottom, [(replica.num_waiting / most_waiting, MEMORY)], f"{replica.num_waiting}")
    running = [
        (replica.num_decodes / replica.max_num_seqs, DECODE),
        (replica.num_prompts / replica.max_num_seqs, PREFILL),
    ]
    _bars(canvas, RUNNING, top, bottom, running, f"{replica.num_decodes}, {replica.num_prompts}")
    _bars(canvas, MEMORY_AT, top, bottom, [(replica.kv_usage, MEMORY)], f"{100 * replica.kv_usage:.0f} %")
    batch = [(replica.decode_tokens / most_tokens, DECODE), (replica.prefill_tokens / most_tokens, PREFILL)]
    _bars(canvas, BATCH, top, bottom, batch, f"{replica.decode_tokens}, {replica.prefill_tokens}")
    _bars(
        canvas, CACHED, top, bottom, [(replica.cached_share, SLACK_COLOURS[3])], f"{100 * replica.cached_share:.0f} %"
    )
    canvas.text(TTFT[0], baseline, f"{replica.predicted_ttft_s:.2f} s")


def _bars(
    canvas: Canvas, column: tuple[int, int], top: int, bottom: int, shares: list[tuple[float, str]], label: str
) -> None:
    """Shares of a column side by side, and the figures behind them."""
    left, right = column
    right -= 44  # for the label
    canvas.rect(left, top, right, bottom, EMPTY)
    x: float = left
    for share, colour in shares:
        stop = min(right, x + share * (right - left))
        canvas.rect(x, top, stop, bottom, colour)
        x = stop
    canvas.text(right + 4, top + 13, label, size=11)
