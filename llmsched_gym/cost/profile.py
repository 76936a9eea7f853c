"""Cost profiles: how long a hybrid batch takes on one device, as a few coefficients and a table, in a JSON file.

A batch of N tokens takes

    overhead + linear(N) + pair * sum_prefill n * (c + (n + 1) / 2) + kv * (sum_decode len + sum_prefill (c + n))

where a prefill chunk computes n tokens behind c computed ones, and a decode reads a context of len tokens. (In the
published runs that the default profile is fitted to, len counts the KV tokens present before the decode.) That suits
engines whose attention kernels are separate by phase; where one kernel serves both, a :class:`Surface` takes the place
of the last two terms.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.config import BLOCK_SIZE, ConfigError, DeviceSpec, ModelSpec, plain_fields
from llmsched_gym.cost.fields import check_number, is_whole, names, section
from llmsched_gym.cost.linear import MOST_TOKENS, SmoothLinear, TableLinear, check_linear, linear_of, linear_table_s
from llmsched_gym.cost.surface import MOST_MS, ProfileError, Sums, Surface
from llmsched_gym.cost.variants import Variant, split_name
from llmsched_gym.files import claim_file, json_with, parse, version_of, write_text

DATA_DIR = Path(__file__).resolve().parent.parent / "data" / "profiles"

FORMATS = (1, 2)
"""Of the JSON files: 2 has a surface; a file that says nothing is of format 1."""


MOST_WHOLE = 2**31 - 1
"""What the engine's records hold."""


@dataclass(frozen=True)
class Profile:
    """What batches of one model cost on one device."""

    name: str
    model: ModelSpec
    device: DeviceSpec
    tile_tokens: int  # batch sizes that are multiples of it waste least
    linear: TableLinear | SmoothLinear  # time of the linear layers against batch tokens
    overhead_ms: float  # per batch
    pair_ms: float  # per pair of a prefill's query token and a key token it attends to
    kv_ms: float  # per KV token read
    num_kv_blocks: int  # of BLOCK_SIZE tokens
    surface: Surface | None = None  # attention by kind of batch; then kv_ms is only what the sum comes closest with
    engine: str = ""  # whose times these are: engine and attention backend
    notes: tuple[str, ...] = ()  # where each figure comes from
    fit: dict[str, Any] | None = field(default=None, hash=False)  # errors against measurements, if there were any

    def __post_init__(self) -> None:
        plain_fields(self)
        for name in ("tile_tokens", "num_kv_blocks"):
            if not is_whole(getattr(self, name)) or getattr(self, name) < 1:
                raise ProfileError(f"{name}: expected a whole number >= 1, got {getattr(self, name)!r}")
            if getattr(self, name) > MOST_WHOLE:
                raise ProfileError(f"{name}: expected a whole number <= {MOST_WHOLE:,}, got {getattr(self, name)!r}")
        for name in ("overhead_ms", "pair_ms", "kv_ms"):
            check_number(name, getattr(self, name), most=MOST_MS)
        check_linear(self.linear)
        if self.surface is not None:
            self._check_surface(self.surface)

    def _check_surface(self, surface: Surface) -> None:
        """Batches take time: chunks have launches taken off, and the trend of the output head goes on.

        Several chunks are tried up to the largest batch of the linear layers' table: beyond it trends may fall.
        """
        for n in surface.sequences:
            if self.ms(n, Sums(n, n * surface.context[0], surface.context[0], n, [])) <= 0.0:
                what = f"{n:,} decodes take no time"
                raise ProfileError(f"surface.sequence_ms: expected times that do not fall below 0, {what}")
        most = self.linear.tokens[-1] if isinstance(self.linear, TableLinear) else MOST_TOKENS
        for chunk, computed in itertools.product(surface.chunk, surface.prefix):
            pairs_ms = self.pair_ms * chunk * (computed + (chunk + 1) / 2)
            each_ms = pairs_ms + surface.chunk_at(chunk, computed) - surface.launch_ms
            rest_ms = self.overhead_ms + surface.launch_ms + surface.chunk_batch_ms
            for n in (1 << i for i in range(max(1, most // chunk).bit_length())):
                if rest_ms + self.linear.at(n * chunk) + surface.sequence_at(n) + n * each_ms <= 0.0:
                    what = f"a chunk of {chunk:,} tokens behind {computed:,} takes no time"
                    if n > 1:
                        what = f"{n:,} chunks of {chunk:,} tokens behind {computed:,} take no time"
                    name = "chunk_ms" if n == 1 else "launch_ms"
                    raise ProfileError(f"surface.{name}: expected less to be taken off, {what}")

    def ms(self, num_tokens: int, sums: Sums) -> float:
        """Milliseconds of a batch, on a profile with a surface."""
        assert self.surface is not None
        return self.overhead_ms + self.linear.at(num_tokens) + self.surface.ms(sums, self.pair_ms)

    @property
    def pair_s(self) -> float:
        """Seconds per pair of a prompt token and a token that it attends to."""
        return self.pair_ms / 1e3

    @property
    def kv_s(self) -> float:
        """Seconds per token of context read."""
        return self.kv_ms / 1e3

    def coefficients(self, max_num_seqs: int) -> np.ndarray:
        """What kernels know of the profile beside :meth:`linear_table_s`, float64.

        Seconds per query-key pair, seconds per KV token, `tile_tokens`, the device's `vllm_token_budget` and
        `sglang_chunk_tokens`, and 0; with a surface a number that only an equal profile has instead of the 0, and
        behind it the surface (:meth:`Surface.packed`).
        """
        budgets = self.device.vllm_token_budget, self.device.sglang_chunk_tokens
        plain = [self.pair_s, self.kv_s, float(self.tile_tokens), *map(float, budgets)]
        if self.surface is None:
            return np.array([*plain, 0.0])
        return np.concatenate([plain, [1.0 + hash(self) % (1 << 52)], self.surface.packed(max_num_seqs)])

    @property
    def basis(self) -> str:
        """What its times rest on, in a word or a few."""
        if self.fit is not None:
            return "measured"
        if any(note.startswith("Supposed:") for note in self.notes):
            return "supposed, not measured"
        if any(note.startswith("Estimate:") for note in self.notes):
            return "estimate, scaled from another device"
        if any(note.startswith("linear:") for note in self.notes):
            return "linear layers measured, attention a roofline"
        return "roofline, not measured"

    def linear_table_s(self, max_tokens: int) -> np.ndarray:
        """Overhead plus linear layers of 0..max_tokens tokens, seconds; read-only, (max_tokens + 1,), and [0] is 0."""
        return linear_table_s(self.linear, self.overhead_ms, max_tokens)

    def scaled(self, factor: float) -> Profile:
        """The profile of a device on which everything takes `factor` times as long."""
        linear: TableLinear | SmoothLinear
        if isinstance(self.linear, SmoothLinear):
            linear = replace(
                self.linear, weight_ms=factor * self.linear.weight_ms, token_ms=factor * self.linear.token_ms
            )
        else:
            linear = replace(self.linear, ms=tuple(factor * ms for ms in self.linear.ms))
        times = {name: factor * getattr(self, name) for name in ("overhead_ms", "pair_ms", "kv_ms")}
        surface = None if self.surface is None else self.surface.scaled(factor)
        return replace(self, linear=linear, surface=surface, fit=None, **times)

    def with_mixing(self, factor: float) -> Profile:
        """The profile on which what decodes add to a batch with a chunk costs `factor` times as much attention."""
        surface = self.surface or Surface.additive(self.kv_ms)
        return replace(self, surface=surface.with_mixing(factor), fit=None)

    def additive(self) -> Profile:
        """What somebody would make of the device who has measured decodes alone and takes batches for sums.

        `kv_ms`, and what the overhead lacks, come closest to batches of 1 to 128 decodes of 128 to 8,192 tokens (least
        squares of relative errors). A profile without a surface is returned as it is.
        """
        if self.surface is None:
            return self
        from scipy.optimize import nnls

        n, k = (x.ravel() for x in np.meshgrid(2 ** np.arange(8), 2 ** np.arange(7, 14), indexing="ij"))
        actual_ms = np.array([1e3 * self.predict_s([], [int(b)] * int(a)) for a, b in zip(n, k, strict=True)])
        known_ms = np.array([self.overhead_ms + self.linear.at(int(a)) for a in n])
        terms = np.stack([np.ones(len(n)), n * k], axis=1) / actual_ms[:, None]
        (extra_ms, kv_ms), _ = nnls(terms, (actual_ms - known_ms) / actual_ms)
        overhead_ms = self.overhead_ms + float(extra_ms)
        return replace(self, overhead_ms=overhead_ms, kv_ms=float(kv_ms), surface=None, fit=None)

    def predict_s(self, chunks: Sequence[tuple[int, int]], decode_contexts: Sequence[int]) -> float:
        """Seconds that a batch takes: prefill chunks as (computed, n) tokens, decodes as context lengths in tokens.

        This is the readable reference of what the engine's kernels compute. An empty batch takes no time.
        """
        num_tokens = sum(n for _, n in chunks) + len(decode_contexts)
        if num_tokens == 0:
            return 0.0
        if self.surface is not None:
            num_sequences = len(chunks) + len(decode_contexts)
            longest = max(decode_contexts, default=0)
            sums = Sums(len(decode_contexts), sum(decode_contexts), longest, num_sequences, chunks)
            return self.ms(num_tokens, sums) / 1e3
        pairs = sum(n * (computed + (n + 1) / 2) for computed, n in chunks)
        kv_tokens = sum(decode_contexts) + sum(computed + n for computed, n in chunks)
        ms = self.overhead_ms + self.linear.at(num_tokens) + self.pair_ms * pairs + self.kv_ms * kv_tokens
        return ms / 1e3

    def to_json(self, path: str | Path) -> None:
        """Write the profile; a reader never sees half a file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _dumps(self.to_dict()))

    @classmethod
    def from_json(cls, path: str | Path) -> Profile:
        """Read a profile; raises :class:`ProfileError` naming file and field."""
        path = Path(path)
        try:
            data = parse(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ProfileError(f"{path}: cannot read: {error.strerror}") from None
        except ValueError as error:
            raise ProfileError(f"{path}: not a JSON file: {error}") from None
        try:
            return cls.from_dict(data)
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The profile as its JSON file holds it."""
        data = {"format": 1 if self.surface is None else 2, **dataclasses.asdict(self)}
        if self.surface is None:
            del data["surface"]
        if self.device.num_devices == 1:
            del data["device"]["num_devices"]
        data["linear"] = {"kind": "table" if isinstance(self.linear, TableLinear) else "smooth", **data["linear"]}
        return data

    @classmethod
    def from_dict(cls, data: Any) -> Profile:
        """A profile from its JSON form; raises :class:`ProfileError` naming the field."""
        data = section(data, "profile", required=names(cls, required=True), known=[*names(cls), "format"])
        number = data.pop("format", 1)
        if number not in FORMATS:
            raise ProfileError(f"format: expected one of {', '.join(map(str, FORMATS))}, got {number!r}")
        if (data.get("surface") is not None) != (number == 2):
            raise ProfileError(f"surface: expected {'an object' if number == 2 else 'none'} in format {number}")
        if not isinstance(data.get("engine", ""), str):
            raise ProfileError(f"engine: expected a sentence, got {data['engine']!r}")
        fit = data.get("fit")
        notes = data.get("notes", [])
        if not isinstance(data["name"], str):
            raise ProfileError(f"name: expected a name, got {data['name']!r}")
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise ProfileError("notes: expected a list of sentences")
        if fit is not None and not isinstance(fit, dict):
            raise ProfileError("fit: expected an object or null")
        model, device = _spec(ModelSpec, data["model"], "model"), _spec(DeviceSpec, data["device"], "device")
        parsed = {"model": model, "device": device, "linear": linear_of(data["linear"]), "notes": tuple(notes)}
        if number == 2:
            fields = section(data["surface"], "surface", names(Surface, required=True), names(Surface))
            parsed["surface"] = Surface.from_dict(fields)
        return cls(**{**data, **parsed})


PROFILES = tuple(sorted(path.stem for path in DATA_DIR.glob("*.json")))
"""Names of the shipped profiles."""


def list_profiles() -> list[Profile]:
    """The shipped profiles, by name."""
    return [load_profile(name) for name in PROFILES]


def load_profile(name_or_path: str | Path) -> Profile:
    """A shipped profile by name, or a JSON file by path (ending in .json); cached until the file changes.

    Brackets behind either change it: ``[mixing=2]`` is :meth:`Profile.with_mixing`, ``[additive=true]``
    :meth:`Profile.additive`, both the one of the other.
    """
    name, variant = split_name(str(name_or_path))
    if name not in PROFILES and not name.endswith(".json"):
        raise ProfileError(f"profile: expected one of {', '.join(PROFILES)}, or a .json file, got {name!r}")
    path = DATA_DIR / f"{name}.json" if name in PROFILES else Path(name)
    try:
        return _load(path, variant, *version_of(path))
    except OSError as error:
        raise ProfileError(f"{path}: cannot read: {error.strerror}") from None


def check_profile_place(out: Path) -> None:
    """ConfigError of one line where no profile can be written, or something else lies; makes nothing."""
    if out.suffix != ".json":
        raise ConfigError(f"out: expected a .json file, got {str(out)!r}")
    claim_file(out, "profile", json_with("model", "device", "linear"))


def kv_blocks(model: ModelSpec, device: DeviceSpec) -> int:
    """KV blocks that fit beside the weights in 90 % of the memory."""
    free = 0.9 * device.memory_bytes - model.weight_bytes
    blocks = int(free // (model.kv_bytes_per_token * BLOCK_SIZE))
    if blocks < 1:
        raise ProfileError(f"num_kv_blocks: the weights of {model.name} leave no memory on {device.name}")
    return blocks


@functools.lru_cache(maxsize=32)
def _load(path: Path, variant: Variant, absolute: Path, version: tuple[int, ...]) -> Profile:
    profile = Profile.from_json(path)
    changes = []
    if variant.additive:
        profile, changes = profile.additive(), ["additive=true"]
    if variant.mixing is not None:
        profile, changes = profile.with_mixing(variant.mixing), [*changes, f"mixing={variant.mixing:g}"]
    if not changes:
        return profile
    name = f"{profile.name}[{','.join(changes)}]"
    return replace(profile, name=name, notes=(f"Supposed: {name}, a variant of what was measured.", *profile.notes))


def _dumps(data: dict[str, Any]) -> str:
    """Indented JSON, with every list of numbers on one line."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    return re.sub(r'\[([^][{}"]*)\]', lambda match: "[" + " ".join(match[1].split()) + "]", text)


def _spec(cls: type[Any], data: Any, where: str) -> Any:
    """A ModelSpec or DeviceSpec: a name, and positive numbers."""
    values = section(data, where, names(cls, required=True), names(cls))
    for name, value in values.items():
        if name != "name":
            check_number(f"{where}.{name}", value, open_low=True)
    return cls(**values)
