"""
Makes data/docs, the text of results/study.py: English prose from the documentation in six packages of Debian.
And data/tune, to choose rates on: what data/docs trains on, but for one document in fifty held out anew.

    apt-get update && python results/corpus.py         # downloads 70 MB; needs dpkg-deb and Debian 12

It takes the paragraphs that are prose, each once, without markup. Debian updates its packages: the number of
tokens tells whether a text is the one that results/README.md reports on.
"""

import gzip
import html
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import prepare_data
from substrate import UserError, cli

PACKAGES = {                         # and which of their files hold text that is not in others again
    'linux-doc-6.1': r'/Documentation/(?!translations/).*\.rst\.gz$', 'python3.11-doc': r'/_sources/.*\.txt$',
    'perl-doc': r'\.pod$', 'git-doc': r'\.txt$', 'postgresql-doc-15': r'\.html$',
    'python-django-doc': r'/html/(ref|topics|releases|internals|intro|howto|faq|misc)/.*\.html$'}

def paragraphs(page):
    """Yields the paragraphs of a page that are prose, each on one line, without markup."""
    parts = re.split(r'\n\s*\n', page)
    if '</p>' in page:
        parts = [html.unescape(re.sub(r'<[^>]*>', '', part)) for part in re.findall(r'(?s)<p\b.*?</p>', page)]
    for part in parts:
        line = ' '.join(part.split())
        # :func:`open`, Perl's C<open>, `open`, *open* -> open
        line = re.sub(r':[\w:+-]+:`[~!]?([^`<]*?)(?:\s*<[^`]*>)?`|\b[A-Z]<+\s*([^<>]*?)\s*>+', r'\1\2', line)
        line = re.sub(r'`+([^`]*)`+_*|\*+([^*]+)\*+', r'\1\2', line)
        letters = sum(c.isascii() and (c.isalpha() or c == ' ') for c in line)
        if re.fullmatch(r'[A-Z].{60,}[.?!:]\)?', line) and letters > 0.88 * len(line):
            yield line

def pages(archive, pattern):
    """Yields the files of a Debian package whose path has the pattern."""
    with subprocess.Popen(['dpkg-deb', '--fsys-tarfile', archive], stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode='r|') as tar:
            for member in tar:
                if member.isfile() and re.search(pattern, member.name):
                    page = tar.extractfile(member).read()
                    page = gzip.decompress(page) if member.name.endswith('.gz') else page
                    yield page.decode(errors='replace')

def documents(folder):
    """Yields a document for each 4,000 characters of a page, of paragraphs that are not in another one."""
    seen = set()
    for package, pattern in PACKAGES.items():
        for page in pages(next(folder.glob(f'{package}_*.deb')), pattern):
            held = []
            for line in paragraphs(page):
                if line not in seen:
                    seen.add(line)
                    held.append(line)
                if sum(map(len, held)) > 4000:
                    yield '\n'.join(held)
                    held = []
            yield '\n'.join(held)

@cli
def main(argv=None):
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(['apt-get', 'download', '-q', *PACKAGES], cwd=folder, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f'apt-get cannot download {", ".join(PACKAGES)} ({error}): it takes Debian 12')
        names = ' '.join(sorted(path.name for path in Path(folder).glob('*.deb')))
        texts = list(documents(Path(folder)))
        prepare_data.prepare('docs', texts, names)
        # One more line end is another hash, by which prepare_data.py holds out.
        train = (text + '\n' for text in texts if not prepare_data.encode(text)[0])
        prepare_data.prepare('tune', train, names)

if __name__ == '__main__':
    main()
