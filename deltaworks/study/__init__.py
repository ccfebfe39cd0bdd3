"""Studies: several recipes on the same work, compared, searched over or planned, with repeats and intervals."""
