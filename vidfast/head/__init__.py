"""A head: a stack of layers that predicts the teacher's feature from the student's, and its Gaussian, in one pass."""
