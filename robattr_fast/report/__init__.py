"""How certificates look: pictures, one page, words."""
