"""Draws interface/glyphs.npz again, the picture of every token. This writes the same bits:

    python interface/draw_glyphs.py /usr/share/fonts/opentype/unifont/unifont.otf

The font is GNU Unifont 15.0.01, in Debian the package fonts-unifont. The recipe is that of arXiv 2507.04886
less its noise, but control characters are drawn as their control pictures (our choice), or a line end would
be as blank as a space.
"""

import argparse
import functools
import hashlib
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import substrate
from substrate import CELL, VOCAB, Parser, UserError, cli, replacing

def draw_tokens(font_file):
    """The picture of every token, (65536, 128) uint8: 1,024 bits, packed. Several characters stand side by
    side, squeezed to one cell: a pixel is on if at least half of what it covers is. Raises UserError."""
    # the other layout engine fails on some code points
    try:
        font = ImageFont.truetype(font_file, CELL, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise UserError(f'cannot read the font {font_file} ({error}): install fonts-unifont') from None

    @functools.cache
    def cell(character):
        image = Image.new('1', (CELL, CELL))
        # centred by its bounding box: at the origin, combining marks would fall outside
        left, top, right, bottom = font.getbbox(character, mode='1')
        corner = (CELL - left - right) // 2, (CELL - top - bottom) // 2
        ImageDraw.Draw(image).text(corner, character, fill=1, font=font)
        return np.array(image)

    texts = substrate.token_texts()
    texts[:0x20], texts[0x7F] = map(chr, range(0x2400, 0x2420)), '\u2421'
    pictures = np.empty((VOCAB, CELL, CELL), bool)
    for i, text in enumerate(texts):
        row = np.concatenate([cell(character) for character in text], axis=1)     # 32, 32 * len(text)
        pictures[i] = 2 * row.reshape(CELL, CELL, -1).sum(2) >= len(text)
    return np.packbits(pictures.reshape(VOCAB, -1), axis=1)

@cli
def main(argv=None):
    """Writes the pictures."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('font', metavar='FONT', help='unifont.otf')
    packed = draw_tokens(parser.parse_args(argv).font)
    with replacing(substrate.GLYPHS) as beside, open(beside, 'wb') as file:
        np.savez_compressed(file, packed)
    found = hashlib.sha256(packed.tobytes()).hexdigest()
    same = found == substrate.GLYPHS_SHA256
    print(f'wrote {substrate.GLYPHS}:',
          'bit for bit as before' if same else f'a new interface, set GLYPHS_SHA256 to {found}')

if __name__ == '__main__':
    main()
