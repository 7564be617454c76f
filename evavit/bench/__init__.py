"""How fast and how near: what `benchmark.py` and `python -m evavit.compare` measure.

`clocks` times a call, `contenders` compares attention and its layers, `models` whole models, `loader` the loading of
images, `compare` the errors of attentions. `results` is the files that they write.
"""
