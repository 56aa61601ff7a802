"""
Ways to train that results/study.py tries and grow.py does not offer.

    python results/variants.py cosine --data docs --d_model 64 --heads 2      # then as python grow.py

- zero: blocks are born as copies that add nothing yet: their output projections are zero.
- cosine: after its warm-up a rate falls along a cosine to a tenth of its peak, as in grow.py up to 132c9f0.
"""

import math
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

def cosine():
    def set_rates(optimizers, peaks, c, step, steps):
        warmup = min(c.warmup, steps // 2)
        factor = 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup))
        if step < warmup:
            factor = (step + 1) / (warmup + 1)
        for group, peak in zip(grow.groups_of(optimizers), peaks):
            group['lr'] = peak * factor
    grow.set_rates = set_rates

VARIANTS = dict(zero=zero, cosine=cosine)

@cli
def main(argv=None):
    name, *flags = argv or sys.argv[1:] or ['']
    if name not in VARIANTS:
        raise UserError(f'name one of {", ".join(VARIANTS)} first, then flags of grow.py')
    VARIANTS[name]()
    grow.main(flags)

if __name__ == '__main__':
    main()
