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
    def schedule(c, step, steps):
        warmup = min(c.warmup, steps // 2)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup))
    grow.schedule = schedule

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
