"""Small tasks with a known answer, on which a layer's expressiveness is trained and measured."""
