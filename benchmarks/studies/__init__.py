"""Studies of the design of the backward trajectory on the miniature: one question and one page of docs each."""
