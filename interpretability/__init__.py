"""Attribution methods, the localisation score and the figures that show them."""
