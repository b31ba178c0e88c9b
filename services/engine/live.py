"""The live KV cache: pages of one block each in two tensors for all requests, and what one request has of them.

Shape suffixes: L layer, H KV head, P page, B block, T token of a page, S token of a request, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import psutil
import torch
from torch.nn import functional

from kvstore.errors import CapacityError
from kvstore.layout import KVLayout

from .coming import Coming
from .pages import Pages

#: Told how many of the model's first layers are in place.
Layers = Callable[[int], None]


def _ignore(layers: int) -> None:
    """For those who do not want to know."""


class LivePool:
    """K and V of all requests, in the model's own element type.

    Memory is touched only once a page is first used.

    Parameters
    ----------
    layout : KVLayout
    pages : int
    block_tokens : int
        Tokens of a page.
    device : torch.device
    """

    def __init__(self, layout: KVLayout, pages: int, block_tokens: int, device: torch.device) -> None:
        self.layout, self.block_tokens, self.device = layout, block_tokens, device
        self.pages = Pages(pages)
        shape = (layout.layers, layout.kv_heads, pages, block_tokens, layout.head_dim)
        self.k_LHPTD = torch.empty(shape, dtype=layout.dtype, device=device)
        self.v_LHPTD = torch.empty(shape, dtype=layout.dtype, device=device)

    @property
    def used_bytes(self) -> int:
        """Bytes of pages that somebody holds; shared ones count once."""
        return (self.pages.total - self.pages.free) * self.block_tokens * self.layout.bytes_per_token

    def blocks(self, pages: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [B, L, H, T, D] of these pages: views where they lie in a row, else copies."""
        k, v = _select(self.k_LHPTD, pages, 2), _select(self.v_LHPTD, pages, 2)
        return k.permute(2, 0, 1, 3, 4), v.permute(2, 0, 1, 3, 4)

    def fill(self, pages: Sequence[int], write: Callable[[torch.Tensor, torch.Tensor, Layers], None], on_layers: Layers = _ignore) -> None:
        """Let `write` set K and V [B, L, H, T, D] of these pages.

        `write` says each time (its third argument) how many of the first layers it has set for good, at last that it was all of them;
        `on_layers` hears the same once they are in the pages.
        """
        k, v = self.blocks(pages)
        index, done = None if _in_a_row(pages) else torch.tensor(pages, device=self.device), 0

        def place(layers: int) -> None:
            nonlocal done
            if index is not None:
                for pool_LHPTD, x_BLHTD in ((self.k_LHPTD, k), (self.v_LHPTD, v)):
                    pool_LHPTD[done:layers].index_copy_(2, index, x_BLHTD[:, done:layers].permute(1, 2, 0, 3, 4))
            done = layers
            on_layers(layers)

        write(k, v, place)

    def set_aside(self, pages: Sequence[int]) -> list[int]:
        """Where a copy of these pages is held, out of the requests' way; the pages themselves, where there is no room for one."""
        try:
            copies = self.pages.take_last(len(pages))
        except CapacityError:
            self.pages.share(pages)
            return list(pages)
        if self.device.type == "cuda":  # where a launch a page costs more than memory between
            here, there = torch.tensor([list(pages), copies], device=self.device)
            for x_LHPTD in (self.k_LHPTD, self.v_LHPTD):
                x_LHPTD.index_copy_(2, there, x_LHPTD.index_select(2, here))
            return copies
        for x_LHPTD in (self.k_LHPTD, self.v_LHPTD):
            for page, copy in zip(pages, copies, strict=True):
                x_LHPTD[:, :, copy] = x_LHPTD[:, :, page]
        return copies


class LiveKV:
    """The cache of one request: pages in the order of its tokens, some of them perhaps shared with other requests.

    `length` counts the tokens that attention may see; it is no position once a press has dropped tokens. Only pages of its own are
    written to: what is shared are whole blocks before the first token that it computes.
    """

    def __init__(self, pool: LivePool) -> None:
        self.pool, self.layout, self.device, self.block_tokens = pool, pool.layout, pool.device, pool.block_tokens
        self.length = 0
        self.page_ids: list[int] = []
        #: Set while upper layers of the cached prefix are still being written.
        self.coming: Coming | None = None
        self.positions_LHT: torch.Tensor | None = None

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all. Raises CapacityError when there are not enough free pages; nothing has changed then."""
        missing = -(-tokens // self.block_tokens) - len(self.page_ids)
        if missing > 0:
            self.page_ids += self.pool.pages.take(missing, self.page_ids[-1] if self.page_ids else None)

    def adopt(self, pages: Sequence[int]) -> None:
        """Begin with these pages of whole blocks, of which hold has been taken."""
        self.page_ids = list(pages)
        self.length = len(pages) * self.block_tokens

    def release(self) -> None:
        """Give all pages back, as soon as nobody writes to them. Calling it again changes nothing."""
        pages, self.page_ids, self.length = self.page_ids, [], 0
        coming, self.coming = self.coming, None
        if coming is None:
            self.pool.pages.give(pages)
        else:
            coming.abandon(lambda: self.pool.pages.give(pages))

    def layer(self, layer: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [H, S, D] of the tokens before `stop` in one layer: views where the pages lie in a row, else copies."""
        pages = self.page_ids[: -(-stop // self.block_tokens)]
        k, v = (_select(x[layer], pages, 1).flatten(1, 2) for x in (self.pool.k_LHPTD, self.pool.v_LHPTD))
        return k[:, :stop], v[:, :stop]

    def keys(self) -> torch.Tensor:
        """K [L, H, S, D] of all tokens."""
        return _select(self.pool.k_LHPTD, self.page_ids, 2).flatten(2, 3)[:, :, : self.length]

    def write(self, layer: int, place: int, k_HTD: torch.Tensor, v_HTD: torch.Tensor) -> None:
        """Set one layer's K and V of the tokens from `place` on, all in one page."""
        page, at = self.page_ids[place // self.block_tokens], place % self.block_tokens
        span = slice(at, at + k_HTD.shape[1])
        self.pool.k_LHPTD[layer, :, page, span], self.pool.v_LHPTD[layer, :, page, span] = k_HTD, v_HTD

    def keep(self, places_LHN: torch.Tensor) -> None:
        """Drop all tokens but those at these places [L, H, N], ascending, into pages of its own.

        Raises CapacityError, with nothing changed, when pages that are shared leave too few.

        The heads' tokens differ from then on, so `positions_LHT` says where in the sequence each was.
        """
        count = places_LHN.shape[2]
        old, size = self.page_ids, self.block_tokens
        index = functional.pad(places_LHN, (0, -count % size))[..., None].expand(-1, -1, -1, self.layout.head_dim)
        kept = [_select(x, old, 2).flatten(2, 3).gather(2, index) for x in (self.pool.k_LHPTD, self.pool.v_LHPTD)]
        self.page_ids, self.length = self.pool.pages.exchange(old, -(-count // size)), count
        before = self.positions_LHT
        self.positions_LHT = (places_LHN if before is None else before.gather(2, places_LHN)).clone()
        k, v = (x.unflatten(2, (-1, size)).permute(2, 0, 1, 3, 4) for x in kept)

        def write(to_k: torch.Tensor, to_v: torch.Tensor, place: Layers) -> None:
            to_k.copy_(k)
            to_v.copy_(v)
            place(self.layout.layers)

        self.pool.fill(self.page_ids, write)

    def appended(self, position: int) -> None:
        """The token at the last place was at `position` of the sequence; needs no saying before tokens are dropped."""
        if self.positions_LHT is not None:
            self.positions_LHT = functional.pad(self.positions_LHT, (0, 1), value=position)

    def hidden(self, layer: int, count: int, stop: int, window: int | None) -> torch.Tensor:
        """[H or 1, count, stop]: which tokens the last `count` before place `stop` may not attend to, in one layer."""
        place = torch.arange(stop, device=self.device)
        query = place[stop - count :, None]
        hidden = (place > query)[None]
        if window:
            at = place[None] if self.positions_LHT is None else self.positions_LHT[layer, :, :stop]
            hidden = hidden | (at[:, None, :] <= at[:, stop - count :, None] - window)
        return hidden


def affordable_tokens(layout: KVLayout, device: torch.device) -> int:
    """Tokens of live cache for which there is memory: half of what a CPU's machine has left, four fifths of a GPU's."""
    cuda = device.type == "cuda"
    room_bytes = torch.cuda.mem_get_info(device)[0] * 4 // 5 if cuda else psutil.virtual_memory().available // 2
    return room_bytes // layout.bytes_per_token


def _in_a_row(pages: Sequence[int]) -> bool:
    return not pages or list(pages) == list(range(pages[0], pages[0] + len(pages)))


def _select(x: torch.Tensor, pages: Sequence[int], dim: int) -> torch.Tensor:
    """Those pages of `x` along `dim`, as a view where they lie in a row."""
    if _in_a_row(pages):
        return x.narrow(dim, pages[0] if pages else 0, len(pages))
    return x.index_select(dim, torch.tensor(pages, device=x.device))
