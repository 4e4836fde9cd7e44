"""What a machine offers, and what a report of a fault needs.  May not import what belongs to one product."""
