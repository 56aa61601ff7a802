"""
Ways to train that results/study.py tries and grow.py does not offer.

    python results/variants.py stable --data docs --d_model 64 --heads 2      # then as python grow.py

- zero: blocks are born as copies that add nothing yet: their output projections are zero.
- stable: after its warm-up a rate stays at its peak, and falls to zero over the last fifth of a phase.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grow
from substrate import UserError, cli

def zero():
    append = grow.GrowingTransformer.append
    def born(model, count):
        below = len(model.blocks)
        append(model, count)
        for block in model.blocks[below:]:
            for part in (block.out.weight, block.down.weight, block.down.bias):
                part.data.zero_()
    grow.GrowingTransformer.append = born

def stable():
    def set_rates(optimizers, peaks, c, step, steps):
        warmup = min(c.warmup, steps // 2)
        for group, peak in zip(grow.groups_of(optimizers), peaks):
            group['lr'] = peak * min(1, (step + 1) / (warmup + 1), 5 * (steps - step) / steps)
    grow.set_rates = set_rates

VARIANTS = dict(zero=zero, stable=stable)

@cli
def main(argv=None):
    name, *flags = argv or sys.argv[1:] or ['']
    if name not in VARIANTS:
        raise UserError(f'name one of {", ".join(VARIANTS)} first, then flags of grow.py')
    VARIANTS[name]()
    grow.main(flags)

if __name__ == '__main__':
    main()
