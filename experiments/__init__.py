"""What turns finished runs into tables, figures and reports."""
