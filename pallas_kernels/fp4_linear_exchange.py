"""How an FP4 linear kernel for Hopper ends: partial results of a cluster are added, in the order of the parts.

Either every CTA leaves its accumulators in its shared memory, in the ring's place, and each reads its share of the
outputs from all of them; or they go straight from registers to the CTA that adds them, whose barrier counts their
bytes (`push`: quicker, but it needs room beside the ring).
"""

from __future__ import annotations

from pallas_kernels import fp4_linear_tiles as tiling
from pallas_kernels.fp4_linear_tiles import EXCHANGE_PAD, Config, Problem
from pallas_kernels.fragments import BLOCK
from pallas_kernels.ptx import Ptx, vector

ALL = 1  # named barrier of the whole CTA (Mosaic has 0)


class Exchange:
    """What a kernel with these registers inherits.

    Attributes:
        tid, wg, w, g, t: of the thread: in the CTA, its warpgroup, the warp in that, the lane's group, place in it.
        part, token, rank: of the CTA: its tile of outputs, its first token, its part of the contraction.
        shared: where shared memory begins.
        acc: accumulators, by 64-output tile of the warpgroup.
        tmp, wide, pred: to work with.
    """

    tid: str
    wg: str
    w: str
    g: str
    t: str
    part: str
    token: str
    rank: str
    shared: str
    acc: list[list[str]]
    tmp: str
    wide: str
    pred: str

    def __init__(self, problem: Problem, config: Config):
        self.p, self.c, self.ptx = problem, config, Ptx()
        self.threads = 128 * config.warpgroups
        self.rows = tiling.rows(config)

    def exchange_and_store(self) -> None:
        """All of it, once every product of the CTA is complete."""
        if self.c.push:
            self._push_partial_results()
            self._add_pushed_and_store()
        else:
            self._write_partial_results()
            self._add_and_store()

    def _write_partial_results(self) -> None:
        """Accumulators to shared memory, float32 [token][row]; then all of the cluster's are there."""
        ptx, c = self.ptx, self.c
        pitch = (self.rows + EXCHANGE_PAD) * 4
        to = ptx.reg("to")
        # accumulators 4n .. 4n + 3: row g at tokens 8n + 2t, 8n + 2t + 1, then row g + 8
        ptx(
            f"mad.lo.u32 {to}, {self.t}, {2 * pitch}, {self.shared};",
            f"mad.lo.u32 {to}, {self.g}, 4, {to};",
            f"mad.lo.u32 {to}, {self.w}, {16 * 4}, {to};",
            f"mad.lo.u32 {to}, {self.wg}, {c.tiles * BLOCK * 4}, {to};",
        )
        for tile, accumulators in enumerate(self.acc):
            for i, register in enumerate(accumulators):
                token, row = 8 * (i // 4) + i % 2, 64 * tile + 8 * (i // 2 % 2)
                ptx(f"st.shared.f32 [{to}+{token * pitch + row * 4}], {register};")
        if c.split > 1:  # arrive.release would wait for global memory too
            ptx(
                "fence.acq_rel.cluster;",
                "barrier.cluster.arrive.relaxed.aligned;",
                "barrier.cluster.wait.acquire.aligned;",
            )
        else:
            ptx(f"bar.sync {ALL}, {self.threads};")

    def _add_and_store(self) -> None:
        """Each CTA adds its share of the rows over the cluster, in order, and stores it: 8 outputs a thread."""
        ptx, c = self.ptx, self.c
        groups = tiling.share(c) // 8  # of a token
        items = c.tokens * groups
        token, group, at, item = ptx.regs("item", 4)
        there = ptx.reg("there")
        total, more = ptx.regs("total", 8, "f32"), ptx.regs("more", 8, "f32")
        for first in range(0, items, self.threads):
            done = ptx.label("stored")
            self._item(first, items, groups, item, token, group, done)
            ptx(
                f"mad.lo.u32 {group}, {self.rank}, {groups}, {group};",
                f"mad.lo.u32 {at}, {token}, {(self.rows + EXCHANGE_PAD) * 4}, {self.shared};",
                f"mad.lo.u32 {at}, {group}, 32, {at};",
            )
            for rank in range(c.split):
                into = total if rank == 0 else more
                space, source = "shared", at
                if c.split > 1:
                    ptx(f"mapa.shared::cluster.u32 {there}, {at}, {rank};")
                    space, source = "shared::cluster", there
                for i in (0, 4):
                    ptx(f"ld.{space}.v4.f32 {vector(into[i : i + 4])}, [{source}+{i * 4}];")
                if rank:
                    ptx(*(f"add.f32 {a}, {a}, {b};" for a, b in zip(total, more, strict=True)))
            self._store(token, group, total, done)
        if c.split > 1:  # a CTA's memory must outlive the others' reads of it
            ptx("barrier.cluster.arrive.relaxed;", "barrier.cluster.wait;")

    def _item(self, first: int, items: int, groups: int, item: str, token: str, group: str, done: str) -> None:
        """This thread's token and group of outputs of the items from `first` on; to `done` if there is none."""
        ptx = self.ptx
        ptx(f"add.u32 {item}, {self.tid}, {first};")
        ptx.divide(token, group, item, groups, items + self.threads)
        ptx(f"add.u32 {item}, {token}, {self.token};")
        if first + self.threads > items:
            ptx(f"setp.ge.u32 {self.pred}, {token}, {self.c.tokens};", f"@{self.pred} bra {done};")
        ptx(f"setp.ge.u32 {self.pred}, {item}, {self.p.batch};", f"@{self.pred} bra {done};")

    def _store(self, token: str, group: str, total: list[str], done: str) -> None:
        """Round 2 or 8 totals, of this token of the CTA and group of its rows, and store them."""
        ptx, p, count = self.ptx, self.p, len(total)
        out = ptx.reg("out", "b64")
        ptx(
            f"add.u32 {token}, {token}, {self.token};",
            f"mul.wide.u32 {out}, {token}, {p.outputs * p.out_bytes};",
            f"add.u64 {out}, $3, {out};",
            f"mad.lo.u32 {group}, {self.part}, {self.rows // count}, {group};",
            f"mul.wide.u32 {self.wide}, {group}, {count * p.out_bytes};",
            f"add.u64 {out}, {out}, {self.wide};",
        )
        words = total
        if p.out_bytes == 2:
            words = ptx.regs("packed", count // 2)
            for i, word in enumerate(words):
                ptx(f"cvt.rn.bf16x2.f32 {word}, {total[2 * i + 1]}, {total[2 * i]};")
        for first in range(0, len(words), 4):
            some = words[first : first + 4]
            suffix, value = (f".v{len(some)}", vector(some)) if len(some) > 1 else ("", some[0])
            ptx(f"st.global{suffix}.b32 [{out}+{first * 4}], {value};")
        ptx(f"{done}:")

    def expect_partial_results(self) -> None:
        """A barrier that opens when all partial results of this CTA's share are there; tell the cluster of it."""
        ptx, c = self.ptx, self.c
        self.exchange, self.barrier = ptx.reg("exchange"), ptx.reg("barrier")
        skip = ptx.label("not_the_first")
        ptx(
            f"add.u32 {self.barrier}, {self.shared}, {c.slots * tiling.stage_bytes(c)};",
            f"add.u32 {self.exchange}, {self.barrier}, {tiling.BARRIER_BYTES};",
            f"setp.ne.u32 {self.pred}, {self.tid}, 0;",
            f"@{self.pred} bra {skip};",
            f"mbarrier.init.shared::cta.b64 [{self.barrier}], 1;",
            "fence.mbarrier_init.release.cluster;",
            f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [{self.barrier}], {self.rows * c.tokens * 4};",
            f"{skip}:",
            "barrier.cluster.arrive.relaxed;",  # waited for before the first push
        )

    def _push_partial_results(self) -> None:
        """Accumulators to the CTA that adds them, [rank][row of its share][token]; its barrier counts their bytes."""
        ptx, c = self.ptx, self.c
        pitch = (c.tokens + tiling.PUSH_PAD) * 4
        groups = tiling.share(c) // 8  # of 8 rows, in a share
        row, at, target, to, there = ptx.regs("push", 5)
        ptx(
            "barrier.cluster.wait.acquire;",
            f"mad.lo.u32 {at}, {self.rank}, {tiling.share(c) * pitch}, {self.exchange};",
            f"mad.lo.u32 {at}, {self.g}, {pitch}, {at};",
            f"mad.lo.u32 {at}, {self.t}, 8, {at};",
        )
        for tile in range(c.tiles):
            for half in range(2):  # accumulators 4n .. 4n + 3: row g at tokens 8n + 2t, 8n + 2t + 1, then row g + 8
                ptx(
                    f"mul.lo.u32 {row}, {self.wg}, {c.tiles * 8};",
                    f"mad.lo.u32 {row}, {self.w}, 2, {row};",
                    f"add.u32 {row}, {row}, {tile * 8 + half};",
                )
                ptx.divide(target, row, row, groups, self.rows // 8)
                ptx(
                    f"mad.lo.u32 {to}, {row}, {8 * pitch}, {at};",
                    f"mapa.shared::cluster.u32 {to}, {to}, {target};",
                    f"mapa.shared::cluster.u32 {there}, {self.barrier}, {target};",
                )
                for n in range(c.tokens // 8):
                    pair = vector(self.acc[tile][4 * n + 2 * half : 4 * n + 2 * half + 2])
                    ptx(
                        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 "
                        f"[{to}+{n * 32}], {pair}, [{there}];"
                    )

    def _add_pushed_and_store(self) -> None:
        """Add what the ranks have pushed, in their order, and store it: 2 outputs a thread."""
        ptx, c = self.ptx, self.c
        share, pitch = tiling.share(c), (c.tokens + tiling.PUSH_PAD) * 4
        items = c.tokens * share // 2
        token, pair, at, item = ptx.regs("item", 4)
        total, more = ptx.regs("total", 2, "f32"), ptx.regs("more", 2, "f32")
        again = ptx.label("await")
        ptx(
            f"{again}:",
            f"mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 {self.pred}, [{self.barrier}], 0;",
            f"@!{self.pred} bra {again};",
        )
        for first in range(0, items, self.threads):
            done = ptx.label("stored")
            self._item(first, items, share // 2, item, token, pair, done)
            ptx(
                f"mad.lo.u32 {at}, {pair}, {2 * pitch}, {self.exchange};",
                f"mad.lo.u32 {at}, {token}, 4, {at};",
                f"mad.lo.u32 {pair}, {self.rank}, {share // 2}, {pair};",
            )
            for rank in range(c.split):
                into = total if rank == 0 else more
                for i in range(2):
                    ptx(f"ld.shared.f32 {into[i]}, [{at}+{rank * share * pitch + i * pitch}];")
                if rank:
                    ptx(*(f"add.f32 {a}, {a}, {b};" for a, b in zip(total, more, strict=True)))
            self._store(token, pair, total, done)
