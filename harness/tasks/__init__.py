"""Tasks of other people's libraries, a package each, found by their name as a user's own are."""
