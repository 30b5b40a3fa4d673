"""Scripts for the documentation: tables, figures and the gallery, from recorded results."""
