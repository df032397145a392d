"""The completion scripts of bash, zsh and fish, in which `completion` fills in the words."""

TABLES = r"""_smalti_keys() {
    case "$$1" in
$keys
    esac
}
_smalti_topics() {
    case "$$1" in
$topics
    esac
}
_smalti_values() {
    case "$$1:$$2" in
$values
    esac
}
"""
"""What both know of verbs, keys and values."""

BASH = (
    r"""# Completion of smalti in bash. Write it once, and again after an update:
#   smalti completion bash > ~/.local/share/bash-completion/completions/smalti
"""
    + TABLES
    + r"""_smalti_add() {  # the candidates of compgen's options $$1 that begin with $$2
    local found
    while IFS= read -r found; do
        COMPREPLY+=("$$3$$found$$4")
    done < <(eval "compgen $$1 -- \"\$$2\"")
}
_smalti_files() {
    type compopt &> /dev/null && compopt -o filenames
    _smalti_add -f "$$1" "$$2"
}
_smalti() {
    # "=" may part words for bash: the line is read instead.
    local line="$${COMP_LINE:0:COMP_POINT}" words at cur verb before prefix="" values
    COMPREPLY=()
    read -ra words <<< "$$line"
    at=$$(( $${#words[@]} - 1 ))
    cur="$${words[at]}"
    if [[ "$$line" == *[[:space:]] ]]; then
        at=$$(( at + 1 ))
        cur=""
    fi
    verb="$${words[1]//-/_}"
    before="$${words[at-1]}"
    if (( at == 1 )); then
        _smalti_add "-W '$verbs'" "$$cur"
    elif [[ "$$verb" == help ]] && (( at == 2 )); then
        _smalti_add "-W '$names'" "$$cur"
    elif [[ "$$verb" == help ]]; then
        _smalti_add "-W '$$(_smalti_topics "$${words[2]//-/_}")'" "$$cur"
    elif [[ "$$verb" == completion ]]; then
        _smalti_add "-W '$shells'" "$$cur"
    elif [[ "$$before" == --config ]]; then
        _smalti_add "-W '$presets'" "$$cur"
        _smalti_files "$$cur"
    elif [[ "$$before" == --import ]]; then
        _smalti_files "$$cur"
    elif [[ "$$before" == --help || "$$before" == help ]] && [[ "$$cur" != *=* ]]; then
        _smalti_add "-W '$$(_smalti_topics "$$verb")'" "$$cur"
    elif [[ "$$cur" == *=* ]]; then
        [[ "$$COMP_WORDBREAKS" == *=* ]] || prefix="$${cur%%=*}="
        values="$$(_smalti_values "$$verb" "$${cur%%=*}")"
        if [[ "$$values" == / ]]; then
            _smalti_files "$${cur#*=}" "$$prefix"
        else
            _smalti_add "-W '$$values'" "$${cur#*=}" "$$prefix"
        fi
    elif [[ "$$cur" == -* ]]; then
        _smalti_add "-W '$options'" "$$cur"
    else
        type compopt &> /dev/null && compopt -o nospace
        _smalti_add "-W '$$(_smalti_keys "$$verb")'" "$$cur" "" "="
    fi
}
complete -F _smalti smalti
"""
)

ZSH = (
    r"""#compdef smalti
# Completion of smalti in zsh. Write it once, and again after an update, into a folder of $$fpath:
#   mkdir -p ~/.zfunc && smalti completion zsh > ~/.zfunc/_smalti
# and in ~/.zshrc, before compinit: fpath+=~/.zfunc
"""
    + TABLES
    + r"""_smalti() {
    local verb="$${words[2]//-/_}" before="$${words[CURRENT-1]}" values
    if (( CURRENT == 2 )); then
        compadd -- $verbs
    elif [[ "$$verb" == help ]] && (( CURRENT == 3 )); then
        compadd -- $names
    elif [[ "$$verb" == help ]]; then
        compadd -- $${=$$(_smalti_topics "$${words[3]//-/_}")}
    elif [[ "$$verb" == completion ]]; then
        compadd -- $shells
    elif [[ "$$before" == --config ]]; then
        compadd -- $presets
        _files
    elif [[ "$$before" == --import ]]; then
        _files
    elif [[ "$$before" == --help || "$$before" == help ]] && [[ "$$PREFIX" != *=* ]]; then
        compadd -- $${=$$(_smalti_topics "$$verb")}
    elif [[ "$$PREFIX" == *=* ]]; then
        values="$$(_smalti_values "$$verb" "$${PREFIX%%=*}")"
        compset -P 1 '*='
        if [[ "$$values" == / ]]; then
            _files
        else
            compadd -- $${=values}
        fi
    elif [[ "$$PREFIX" == -* ]]; then
        compadd -- $options
    else
        compadd -S '=' -- $${=$$(_smalti_keys "$$verb")}
    fi
}
if [[ "$${funcstack[1]}" == _smalti ]]; then
    _smalti "$$@"
else
    compdef _smalti smalti
fi
"""
)

FISH = r"""# Completion of smalti in fish. Write it once, and again after an update:
#   smalti completion fish > ~/.config/fish/completions/smalti.fish
function __smalti_keys
    switch $$argv[1]
$keys
    end
end
function __smalti_topics
    switch $$argv[1]
$topics
    end
end
function __smalti_values
    switch $$argv[1]:$$argv[2]
$values
    end
end
function __smalti_words
    set -l words (commandline -opc)
    set -l cur (commandline -ct)
    set -l verb (string replace -a - _ -- $$words[2])
    if test (count $$words) -lt 2
        string split ' ' -- '$verbs'
    else if test "$$verb" = help -a (count $$words) -eq 2
        string split ' ' -- '$names'
    else if test "$$verb" = help
        string split ' ' -- (__smalti_topics (string replace -a - _ -- $$words[3]))
    else if test "$$verb" = completion
        string split ' ' -- '$shells'
    else if test "$$words[-1]" = --config
        string split ' ' -- '$presets'
        __fish_complete_path $$cur
    else if test "$$words[-1]" = --import
        __fish_complete_path $$cur
    else if contains -- "$$words[-1]" --help help; and not string match -q '*=*' -- $$cur
        string split ' ' -- (__smalti_topics $$verb)
    else if string match -q '*=*' -- $$cur
        set -l parts (string split -m 1 = -- $$cur)
        set -l values (__smalti_values $$verb $$parts[1])
        if test "$$values" = /
            __fish_complete_path $$parts[2] | string replace -r '^' "$$parts[1]="
        else if test -n "$$values"
            string split ' ' -- $$values | string replace -r '^' "$$parts[1]="
        end
    else if string match -q -- '-*' $$cur
        string split ' ' -- '$options'
    else
        string split ' ' -- (__smalti_keys $$verb) | string replace -r '$$' =
    end
end
complete -c smalti -f -a '(__smalti_words)'
"""
