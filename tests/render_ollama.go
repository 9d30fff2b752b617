// Renders a template of Ollama with its words for a conversation, as text/template of Go does, for
// test_convert.py. Arguments: template file, conversation file (JSON). Names of fields are those of Ollama's API.
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type arguments map[string]any
type function struct {
	Name        string `json:"name"`
	Description string `json:"description"`
	Parameters  any    `json:"parameters"`
}
type tool struct{ Function function }
type call struct {
	Function struct {
		Name      string
		Arguments arguments
	}
}
type message struct {
	Role, Content, Thinking string
	ToolCalls               []call
}
type conversation struct {
	System            string
	Tools             []tool
	Messages          []message
	Think, IsThinkSet bool
}

func text(value any) string        { b, _ := json.Marshal(value); return string(b) }
func (f function) String() string  { return text(f) }
func (a arguments) String() string { return text(map[string]any(a)) }

func main() {
	source, _ := os.ReadFile(os.Args[1])
	content, _ := os.ReadFile(os.Args[2])
	var spoken conversation
	if err := json.Unmarshal(content, &spoken); err != nil {
		panic(err)
	}
	if err := template.Must(template.New("").Parse(string(source))).Execute(os.Stdout, spoken); err != nil {
		panic(err)
	}
}
