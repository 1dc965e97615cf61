"""The second kernel family: one variance an element, predicted as the mean is."""
