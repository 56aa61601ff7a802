"""The text that every Python brings along: the docstrings, comments and help topics of its standard library, which are prose. The code between
them would mostly teach a small model indentation. Python 3.11 gives 656 documents, 2.9 MB, 1.7 M tokens, in 5 s.

    python prepare_data.py stdlib                                   # makes a data set of it
"""

import ast
import inspect
import io
import re
import sysconfig
import tokenize
from pathlib import Path

def normalised(text):
    """Plain prose: lines wrapped in mid-sentence are joined, paragraphs with interactive examples or tables left out, runs of blanks or
    punctuation cut to three characters."""
    text = text.encode(errors='replace').decode()      # a docstring may hold half a surrogate pair, which is no character
    text = inspect.cleandoc(re.sub(r'[ \t]+$', '', text, flags=re.MULTILINE))
    text = '\n\n'.join(paragraph for paragraph in text.split('\n\n') if not re.search(r'>>>|^ *[|+]', paragraph, flags=re.MULTILINE))
    return re.sub(r'([^a-zA-Z0-9])\1{3,}', r'\1\1\1', re.sub(r'(?<=[a-z,])\n(?=[a-z(`"*])', ' ', text))

def prose(source):
    """The docstrings of a module and its comment blocks (runs of full-line comments), in source order."""
    pieces, blocks, previous = [], [], None
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            pieces.append((node.body[0].lineno, normalised(ast.get_docstring(node))))     # get_docstring takes the indentation away
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith('#'):
            line, column = token.start
            if previous != (line - 1, column):
                blocks.append((line, []))
            blocks[-1][1].append(token.string.lstrip('#').removeprefix(' '))
            previous = line, column
    for line, comments in blocks:
        text = normalised('\n'.join(comments))
        if len(text) >= 60 and sum(c.isalpha() or c.isspace() for c in text) >= 0.75 * len(text):     # tables and old code fall out
            pieces.append((line, text))
    return [text for _, text in sorted(pieces)]

def stdlib_documents():
    """Yields a document for each 4,000 characters of a module, then one a topic of Python's `help()`."""
    from pydoc_data.topics import topics
    library = Path(sysconfig.get_path('stdlib'))
    left_out = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'encodings', '__pycache__'}
    seen = set()                                       # licences and inherited docstrings come again and again: the first one stays
    for path in sorted(library.rglob('*.py')):
        if left_out.isdisjoint(path.relative_to(library).parts):
            try:
                with tokenize.open(path) as f:         # knows about coding lines
                    pieces = prose(f.read())
            except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):     # some are broken on purpose
                continue
            held, size = [], 0
            for piece in pieces:
                if piece not in seen:
                    seen.add(piece)
                    held.append(piece)
                    size += len(piece)
                if size > 4000:                        # characters: documents of like size make the split an even one
                    yield '\n\n'.join(held)
                    held, size = [], 0
            yield '\n\n'.join(held)
    for key in sorted(topics):
        yield normalised(topics[key])
