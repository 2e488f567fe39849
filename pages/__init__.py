"""The page that `python sample.py --html=FILE` writes: completions, samples and curves to read.

    collect.py   what the page shows, read from run folders and completion files
    formulas.py  MathML of the formulas in a text
    write.py     one self-contained file from it: page.html with page.css, page.js and the data

The page asks for nothing over a network. Text from data is never read as HTML: it travels as JSON,
and page.js only sets it as text. The two exceptions are rebuilt here from a list of what is
allowed: formulas as MathML elements, curves as an image.
"""
