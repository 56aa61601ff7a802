"""Counts the n-grams of interface/ngrams.txt again: `pip install wordfreq==3.1.1 && python interface/count_ngrams.py` writes the same bytes.

32 languages as in the original (bvv241-2-3, arXiv 2507.04886), but wordfreq lacks its sa (asked for it, it returns Hindi), la, hy, az and ka:
bg, ca, ro, ta and uk stand in. The original stops at rank 338 of each list; ours overlap less and stop at 228.
"""

import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import substrate
from substrate import Parser, UserError, cli, replacing

LATIN = 'ca cs da de en es fi fr hu id it nb nl pl pt ro sv tr vi'.split()
OTHERS = 'ar bg bn el fa he hi ja ko ru ta uk zh'.split()

def rank_ngrams(language):
    """Two lists, the 2-grams and the 3-grams inside the words of `language`, most frequent first. Raises UserError without wordfreq."""
    try:
        from wordfreq import get_frequency_dict
    except ImportError:
        raise UserError('counting n-grams needs word lists: pip install wordfreq==3.1.1') from None
    counts = {2: Counter(), 3: Counter()}
    for word, frequency in get_frequency_dict(language, wordlist='small').items():
        word = re.sub('σ$', 'ς', word)                # the lists are case-folded, which loses the Greek final sigma
        for n, count in counts.items():
            for i in range(len(word) - n + 1):
                count[word[i:i + n]] += round(frequency * 1e9)      # whole numbers: the same sums everywhere

    def wanted(gram):                                 # letters and combining marks, no Latin ones from languages written otherwise
        return all(unicodedata.category(c)[0] in 'LM' and (language in LATIN or not c.isascii()) for c in gram)
    return [sorted(filter(wanted, count), key=lambda gram: (-count[gram], gram)) for count in counts.values()]

@cli
def main(argv=None):
    """Writes the n-gram file."""
    Parser(description=__doc__).parse_args(argv)
    grams = substrate.fill_places([ranking for language in LATIN + OTHERS for ranking in rank_ngrams(language)])
    with replacing(substrate.NGRAMS) as beside:
        beside.write_bytes(''.join(gram + '\n' for gram in grams).encode())
    print(f'wrote {substrate.NGRAMS}, tokenizer fingerprint {substrate.tokenizer_fingerprint()}; if that changed, draw the tokens again')

if __name__ == '__main__':
    main()
