// Package recipes holds the recipes of docs/recipes.md that need more than hotload's own
// requirements, as examples that are compiled and tests that run them.
package recipes
