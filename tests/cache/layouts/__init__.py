"""Writers of official dataset layouts, each from the dataset's own documentation and none from our readers."""
