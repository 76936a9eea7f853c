"""The README's animation: ten seconds of a scheduler at work, in real time.

python -m examples.animation --out docs/animation.gif
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
from PIL import Image, ImageColor

import llmsched_gym  # noqa: F401  registers the environments
from llmsched_gym.env.picture import FAINT, HISTORY_S, INK, PALETTE
from llmsched_gym.env.policy import SchedulerPolicy
from llmsched_gym.env.render import Viewer
from llmsched_gym.help_text import place

SHADES = 16
DRAWN_S = 0.04  # shortest time between two frames: browsers slow down what is faster


def record(
    scheduler: str, qps: float, seed: int, start_s: float, seconds: float
) -> tuple[list[Image.Image], list[int]]:
    """Frames from `start_s` on and how many milliseconds each is shown: as long as it lasted."""
    env: Any = gym.make("LLMSched-v0", qps=qps, horizon_s=start_s + seconds + 1.0).unwrapped
    env.reset(seed=seed)
    policy = SchedulerPolicy(env, scheduler)
    viewer = Viewer(env.core, f"{scheduler} at {qps:g} requests/s")
    frames: list[Image.Image] = []
    times_s: list[float] = []
    clock_s = 0.0
    while clock_s < start_s + seconds:
        _, _, terminated, truncated, info = policy.step()
        clock_s += info["duration_s"]
        if terminated or truncated:
            break
        if clock_s > start_s - HISTORY_S:
            image: Any = viewer.render("rgb_array")
            if clock_s >= start_s and (not times_s or clock_s - times_s[-1] >= DRAWN_S):
                frames.append(Image.fromarray(image))
                times_s.append(clock_s)
    ends_s = [*times_s[1:], clock_s]
    shown_ms = [max(20, 10 * (round(100 * e) - round(100 * b))) for b, e in zip(times_s, ends_s, strict=True)]
    return frames, shown_ms


def gif_colours() -> list[tuple[int, ...]]:
    """The viewer's colours as they are, and the shades of its smoothed text."""
    colours: list[tuple[int, ...]] = [ImageColor.getrgb(colour) for colour in PALETTE]
    for colour in map(ImageColor.getrgb, (INK, FAINT)):
        colours += [tuple(255 - (255 - c) * k // SHADES for c in colour) for k in range(1, SHADES)]
    return colours


def save(frames: list[Image.Image], shown_ms: list[int], out: Path) -> None:
    """Write a GIF in one palette, so that a frame stores what changed and nothing else."""
    palette = Image.new("P", (1, 1))
    palette.putpalette([channel for colour in gif_colours() for channel in colour])
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    out.parent.mkdir(parents=True, exist_ok=True)
    first.save(out, save_all=True, append_images=others, duration=shown_ms, loop=0, disposal=1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=place, default=Path("docs/animation.gif"))
    parser.add_argument("--scheduler", default="slai", help="any scheduler by name")
    parser.add_argument("--qps", type=float, default=1.8, help="requests per second")
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--start", type=float, default=237.0, help="seconds into the episode")
    parser.add_argument("--seconds", type=float, default=11.5)
    args = parser.parse_args(arguments)
    frames, shown_ms = record(args.scheduler, args.qps, args.seed, args.start, args.seconds)
    save(frames, shown_ms, args.out)
    size_mb = args.out.stat().st_size / 1e6
    print(f"{args.out}: {len(frames)} frames, {sum(shown_ms) / 1e3:.1f} s, {size_mb:.2f} MB")


if __name__ == "__main__":
    main()
