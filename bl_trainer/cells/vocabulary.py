"""The tokens of the cells."""

END, ASK = 0, 1  # END also fills rows up
COPY, LONG, ROTATE, SWAP, FACT, EITHER = range(2, 8)  # what a prompt asks for
OPEN, HASH, CLOSE, BANG = range(8, 12)  # of formats
LETTERS = tuple(range(12, 36))
SIZE = 36
