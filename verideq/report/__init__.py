"""What a run found, for people: a table for the terminal (`table`) and a self-contained page (`html`)."""
