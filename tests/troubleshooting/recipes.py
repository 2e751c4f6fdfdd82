"""What can be wrong with a recipe or an override."""

from tests.troubleshooting.lab import case

GROUP = "Recipe and command line"
SECRET = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5"


@case(GROUP, "a recipe that does not exist", "recpie.yaml: no such file", "`recipe.yaml`")
def missing_recipe(lab):
    return ["train", "recpie.yaml"]


@case(GROUP, "an empty recipe", "recipe.yaml:1:", "holds no recipe", "`task`")
def empty_recipe(lab):
    lab.write("recipe.yaml", "# nothing yet\n")
    return ["train", "recipe.yaml"]


@case(GROUP, "a recipe that is a list", "recipe.yaml:1:", "found a list", "expected a mapping")
def list_recipe(lab):
    lab.write("recipe.yaml", "- task: causal-lm\n- model: {name_or_path: ./model}\n")
    return ["train", "recipe.yaml"]


@case(GROUP, "indentation with tabs", "recipe.yaml:3:", "spaces, not with tabs")
def tabs(lab):
    lab.write("recipe.yaml", "task: causal-lm\nmodel:\n\tname_or_path: ./model\n")
    return ["train", "recipe.yaml"]


@case(GROUP, "aliases that repeat each other without end", "recipe.yaml:", "more than 100,000 values", "aliases")
def alias_bomb(lab):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    lab.write("recipe.yaml", "\n".join(lines))
    return ["train", "recipe.yaml"]


@case(GROUP, "a YAML tag that would run code", "recipe.yaml:2:", "`!!python/object/apply:os.system`", "is not allowed")
def python_object(lab):
    lab.write("recipe.yaml", "task: causal-lm\nmodel: !!python/object/apply:os.system ['touch owned']\n")
    return ["train", "recipe.yaml"]


@case(GROUP, "a key that is given twice", "recipe.yaml:4:", "`block_size` is given twice", "recipe.yaml:3")
def duplicate_key(lab):
    lab.write("recipe.yaml", "task: causal-lm\ndata:\n  block_size: 64\n  block_size: 128\n")
    return ["train", "recipe.yaml"]


@case(GROUP, "a recipe that is not UTF-8", "recipe.yaml:1:", "byte 0xe9", "save it as UTF-8")
def recipe_in_latin_1(lab):
    lab.write("recipe.yaml", "# café\ntask: causal-lm\n".encode("latin-1"))
    return ["train", "recipe.yaml"]


@case(GROUP, "an unknown key", "recipe.yaml:16:", "training.learning_rat", "did you mean `learning_rate`?")
def unknown_key(lab):
    return lab.recipe(training={"learning_rate": None, "learning_rat": 1e-3})


@case(GROUP, "a key in another section", "run.learning_rate", "belongs under `training`")
def misplaced_key(lab):
    return lab.recipe(run={"learning_rate": 1e-3})


@case(GROUP, "several mistakes at once", "recipe.yaml: 3 problems", "data.block_size", "expected an integer", "bf16")
def several_mistakes(lab):
    return lab.recipe(data={"block_size": "large"}, training={"bf16": "maybe", "max_steps": 0.5})


@case(GROUP, "`extends` of a file that does not exist", "recipe.yaml:1: extends:", "no such file", "base.yaml")
def extends_nothing(lab):
    lab.write("recipe.yaml", "extends: base.yaml\n")
    return ["train", "recipe.yaml"]


@case(GROUP, "a password in a recipe", "recipe.yaml:", "tracking.wandb.password", "WANDB_API_KEY", hides="mellon7")
def password(lab):
    return lab.recipe(tracking={"wandb": {"project": "medical", "password": "mellon7"}})


@case(GROUP, "a token in a recipe", "recipe.yaml:4:", "holds a secret", "HF_TOKEN", hides=SECRET)
def token(lab):
    return lab.recipe(model={"revision": SECRET})


@case(GROUP, "a token on the command line", "command line: model.token=…", "holds a secret", "HF_TOKEN", hides=SECRET)
def token_override(lab):
    return ["train", "recipe.yaml", f"model.token={SECRET}"]


@case(GROUP, "an override without `=`", "command line: training.max_steps:", "expected section.key=value")
def override_without_value(lab):
    return ["train", "recipe.yaml", "training.max_steps", "10"]


@case(GROUP, "an override that is not YAML", "command line: training.max_steps=[1", "not valid YAML")
def override_not_yaml(lab):
    return ["train", "recipe.yaml", "training.max_steps=[1"]


@case(GROUP, "an override below a value", "command line: data.block_size.x=1", "is not a section", "the number 32")
def override_below_a_value(lab):
    return ["train", "recipe.yaml", "data.block_size.x=1"]


@case(GROUP, "an override with an unknown key", "command line: data.blok_size=64", "did you mean `block_size`?")
def override_unknown_key(lab):
    return ["train", "recipe.yaml", "data.blok_size=64"]


@case(GROUP, "an override of an entry that a list has not", "`data.train` has", "`3`")
def override_missing_entry(lab):
    return ["train", "recipe.yaml", "data.train.3.path=more.txt"]
