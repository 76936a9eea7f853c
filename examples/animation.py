"""The README's animation: ten seconds of a scheduler at work, in real time.

python -m examples.animation --out docs/animation.gif
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium as gym
from PIL import Image

import llmsched_gym  # noqa: F401  registers the environments
from llmsched_gym.env.picture import HISTORY_S, PALETTE
from llmsched_gym.env.render import Viewer
from llmsched_gym.scheduler import install, make_scheduler

COLOURS = 64
DRAWN_S = 0.09  # shortest time between two frames: a GIF of more is larger, not smoother


def record(
    scheduler: str, qps: float, seed: int, start_s: float, seconds: float
) -> tuple[list[Image.Image], list[int]]:
    """Frames from `start_s` on and how many milliseconds each is shown: as long as it lasted."""
    env = gym.make("LLMSched-v0", qps=qps, horizon_s=start_s + seconds + 1.0).unwrapped
    env.reset(seed=seed)
    policy = make_scheduler(scheduler)
    install(policy, env.core.engine.state, seed=seed)
    viewer = Viewer(env.core, f"{scheduler} at {qps:g} requests/s")
    frames: list[Image.Image] = []
    times_s: list[float] = []
    clock_s = 0.0
    while clock_s < start_s + seconds:
        _, _, terminated, truncated, info = env.step_scheduler(policy)
        clock_s += info["duration_s"]
        if terminated or truncated:
            break
        if clock_s > start_s - HISTORY_S:
            image = viewer.render("rgb_array")
            if clock_s >= start_s and (not times_s or clock_s - times_s[-1] >= DRAWN_S):
                frames.append(Image.fromarray(image))
                times_s.append(clock_s)
    ends_s = [*times_s[1:], clock_s]
    shown_ms = [max(20, 10 * (round(100 * e) - round(100 * b))) for b, e in zip(times_s, ends_s, strict=True)]
    return frames, shown_ms


def save(frames: list[Image.Image], shown_ms: list[int], out: Path) -> None:
    """Write a GIF in one palette, so that a frame stores what changed and nothing else."""
    sample = Image.new("RGB", (frames[0].width, frames[0].height + 40))
    sample.paste(frames[0])
    for k, colour in enumerate(PALETTE):  # rare ones would else be averaged with their neighbours
        sample.paste(colour, (40 * k, frames[0].height, 40 * (k + 1), frames[0].height + 40))
    palette = sample.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    out.parent.mkdir(parents=True, exist_ok=True)
    first.save(out, save_all=True, append_images=others, duration=shown_ms, loop=0, disposal=1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/animation.gif"))
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
