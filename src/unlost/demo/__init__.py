"""`unlost demo`: a small shop on real orders, killed with `kill -9` while it works, and then audited.

`shop.py` is the sample to read. The rest plays the world around it: the orders, the web front, the supervisor, the
one who kills, and the one who compares what was settled with the file.
"""
