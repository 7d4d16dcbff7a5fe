"""What vLLM tells a mixer about a batch: which tokens, whose, and where their states are."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.short_conv_attn import (
    ShortConvAttentionBackend,
    ShortConvAttentionMetadata,
    ShortConvAttentionMetadataBuilder,
)


@dataclass
class PagedBatch(ShortConvAttentionMetadata):
    """vLLM's metadata, and which tokens of the prompts are none.

    prompt_tokens: places in the batch of the prompts' own tokens.  prompt_offsets: [prompts + 1]
    where each prompt starts among them. None: all tokens are.
    """

    prompt_tokens: Tensor | None = None
    prompt_offsets: Tensor | None = None


class PagedBatchBuilder(ShortConvAttentionMetadataBuilder):
    """vLLM's own builder for short convolutions, which leaves one-token prompts to the prompts.

    With speculation vLLM 0.32 lengthens a new prompt of one token by drafts that are always
    rejected, so that all requests have the same number of tokens. For requests with a past it
    counts that as decoding, where a rejected draft leaves no trace. A new prompt is run as one
    piece, and its state would be the one after the drafts.
    """

    metadata_cls = PagedBatch

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: Any,
        fast_build: bool = False,
        *,
        num_accepted_tokens: Tensor | None = None,
        num_decode_draft_tokens_cpu: Tensor | None = None,
        **options: Any,
    ) -> PagedBatch:
        batch: PagedBatch = super().build(
            common_prefix_len,
            common_attn_metadata,
            fast_build,
            num_accepted_tokens=num_accepted_tokens,
            num_decode_draft_tokens_cpu=num_decode_draft_tokens_cpu,
            **options,
        )
        if num_decode_draft_tokens_cpu is not None and batch.num_prefills:
            prompts = slice(batch.num_decodes, batch.num_decodes + batch.num_prefills)
            drafts = num_decode_draft_tokens_cpu[prompts].clamp(min=0)  # -1: a piece of a prompt
            if drafts.any():
                offsets = common_attn_metadata.query_start_loc_cpu
                starts = offsets[prompts]
                ends = offsets[prompts.start + 1 : prompts.stop + 1] - drafts
                device = common_attn_metadata.query_start_loc.device
                own = [torch.arange(int(a), int(b)) for a, b in zip(starts, ends)]
                batch.prompt_tokens = torch.cat(own).to(device)
                lengths = torch.cat([ends.new_zeros(1), ends - starts])
                batch.prompt_offsets = lengths.cumsum(0, dtype=torch.int32).to(device)
        return batch


class PagedBackend(ShortConvAttentionBackend):
    """vLLM's backend for short convolutions with our builder."""

    @staticmethod
    def get_builder_cls() -> type[PagedBatchBuilder]:
        return PagedBatchBuilder
