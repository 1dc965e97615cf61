"""vidfast inside other frameworks: one module a framework, which needs it; `import vidfast` imports none of them."""
