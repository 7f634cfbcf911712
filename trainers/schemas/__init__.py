"""What each method's recipe may say: one torch-free file per method, `class Recipe(RecipeBase)`."""
