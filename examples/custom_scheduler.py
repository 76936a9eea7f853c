"""A scheduler of your own, in plain Python."""

from llmsched_gym.engine import Batch, View


class ShortestFirst:
    """Every decode, then prompts from the shortest on, at most 512 tokens in a batch."""

    def schedule(self, view: View) -> Batch:
        tokens = {r.index: 1 for r in view.decodes}
        room, free = 512 - len(tokens), view.free_blocks - view.watermark_blocks - len(tokens)
        for r in [*view.prefills, *sorted(view.waiting, key=lambda r: r.prefill_tokens)]:
            blocks = 0 if r.num_blocks else -(-r.prefill_tokens // 16)
            if room <= 0 or blocks > free or len(tokens) >= view.max_num_seqs:
                break
            tokens[r.index] = min(room, r.prefill_tokens - r.num_computed_tokens)
            room, free = room - tokens[r.index], free - blocks
        return Batch(tokens)
