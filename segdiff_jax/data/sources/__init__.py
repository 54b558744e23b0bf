"""Data sets as random-access sequences of pairs, a file for each layout."""
