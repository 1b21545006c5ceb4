"""A whole task that needs no training to be interesting: a random model that already gets some answers right.

The vocabulary has one token for each boxed number, and an answer ends with it, so a random model is right about one time in
five: the K answers to a question are mixed, verdicts are real, and a few NFT steps learn.
"""

import json
