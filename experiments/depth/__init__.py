"""Does the memory share structure across depth? Usage, similarity, removal and transfer."""
