"""`logitstore plan`: which codec for a goal, measured on a sample of one's own teacher."""
