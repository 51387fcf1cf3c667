package main

import (
	"bytes"
	"encoding/base64"
	"image/png"
	"strings"
	"testing"

	"github.com/openai/openai-go/v3"
)

func TestImagesAreOfAColourThatDependsOnThePrompt(t *testing.T) {
	client := sdk(startDemo(t, "demo_model"))
	paint := func(prompt string, n int64) *openai.ImagesResponse {
		t.Helper()
		got, err := client.Images.Generate(t.Context(), openai.ImageGenerateParams{Model: "demo/model", Prompt: prompt, N: openai.Int(n)})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	otter := paint("An otter", 2)
	if len(otter.Data) != 2 || otter.Usage.InputTokens != 2 || otter.Usage.OutputTokens != 128 || otter.OutputFormat != "png" {
		t.Fatalf("%s", otter.RawJSON())
	}
	raw, err := base64.StdEncoding.DecodeString(otter.Data[0].B64JSON)
	if err != nil {
		t.Fatal(err)
	}
	if decoded, err := png.Decode(bytes.NewReader(raw)); err != nil || decoded.Bounds().Dx() != demoImageSide {
		t.Errorf("%v", err)
	}
	if otter.Data[0].B64JSON == otter.Data[1].B64JSON || otter.Data[0].B64JSON == paint("A seal", 1).Data[0].B64JSON {
		t.Error("all look alike")
	}
	if otter.Data[0].B64JSON != paint("An otter", 1).Data[0].B64JSON {
		t.Error("the same prompt makes another image")
	}
}

func TestBadRequestsForImagesAreRefused(t *testing.T) {
	url := startDemo(t, "demo_model") + "/images/generations"
	for body, want := range map[string]string{
		`{`: "not a request", `{"prompt":""}`: "prompt is required", `{"prompt":"x","n":0}`: "n must be", `{"prompt":"x","n":11}`: "n must be",
	} {
		if status, answer := post(t, url, body); status != 400 || !strings.Contains(answer, want) {
			t.Errorf("%s: %d %s", body, status, answer)
		}
	}
}
