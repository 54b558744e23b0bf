"""From predictions to numbers and pages."""
