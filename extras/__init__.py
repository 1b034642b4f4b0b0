"""What the course does not need: a room each for formats, speed, judges, reports and runs."""
